"""AdamW through megatron-core's optimizers (plain, or sharded over the data-parallel ranks)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as megatron_base_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.optim.adamw import adamw

from illada_megatron.config import RunConfig
from illada_megatron.config.parameters import EMBEDDING, HEAD
from illada_megatron.config.schema import OptimizerConfig
from illada_megatron.model.transformer_config import DTYPES

# megatron-core's choice at import: TE's, else Apex's
_FUSED_ADAM = None if megatron_optimizer.USING_PYTORCH_OPTIMIZER else megatron_optimizer.Adam


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that counts its steps in the param group, as Apex's and TE's FusedAdam do.

    megatron-core falls back to torch.optim.AdamW where neither is installed; that one keeps `step` with each parameter,
    and a distributed optimizer's state could then not be loaded under another layout. The arithmetic is torch's own
    fused kernel.
    """

    moments_dtype = torch.float32

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode or capturable:
            raise ValueError(
                f"AdamW decouples weight decay and runs outside CUDA graphs; found adam_w_mode={adam_w_mode}, "
                f"capturable={capturable}"
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("AdamW takes no closure")
        for group in self.param_groups:
            # Counted on ranks that hold no parameter of the group too: the count is saved once for all ranks.
            group["step"] += 1
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in params:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
            self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Any]) -> None:
        moments = [[self.state[parameter][name] for parameter in params] for name in ("exp_avg", "exp_avg_sq")]
        self._kernel(group, params, *moments)

    def _kernel(
        self, group: dict[str, Any], params: list[Any], first: list[torch.Tensor], second: list[torch.Tensor]
    ) -> None:
        """One step of `params` and their fp32 moments, in place."""
        if not params:
            return
        adamw(
            params,
            [parameter.grad for parameter in params],
            first,
            second,
            [],
            # filled on the device: a number from the host would have it wait
            [torch.full((), group["step"] - 1.0, device=parameter.device) for parameter in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class AdamWInBf16(AdamW):
    """Its moments are stored in bf16 and computed in fp32, a parameter at a time: what they take in fp32 is that of the
    largest parameter. TE's FusedAdam, which can do it too, makes fp32 copies of all of them at each step."""

    moments_dtype = torch.bfloat16

    def _update(self, group: dict[str, Any], params: list[Any]) -> None:
        for parameter in params:
            stored = [self.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
            computed = [moment.float() for moment in stored]
            self._kernel(group, [parameter], *([moment] for moment in computed))
            for moment, result in zip(stored, computed, strict=True):
                moment.copy_(result)


def optimizer_name(config: RunConfig, device: torch.device) -> str:
    """For the start-up table."""
    adam = _inner_optimizer(config.optimizer, device)
    name = "AdamW (torch fused kernel)" if issubclass(adam, AdamW) else f"FusedAdam ({_maker(adam)})"
    moments = ", moments in bf16" if config.optimizer.moments_dtype == "bf16" else ""
    sharded = ", state sharded over data parallel" if config.parallel.use_distributed_optimizer else ""
    return f"{name}{moments}{sharded}"


def _inner_optimizer(settings: OptimizerConfig, device: torch.device) -> type[torch.optim.Optimizer]:
    """TE's FusedAdam, Apex's, ours: the first that is there and does what is asked."""
    if settings.moments_dtype == "bf16":
        return AdamWInBf16
    return AdamW if _FUSED_ADAM is None or device.type != "cuda" else _FUSED_ADAM


def _maker(adam: type[torch.optim.Optimizer]) -> str:
    return "Transformer Engine" if adam.__module__.startswith("transformer_engine") else "Apex"


def build_optimizer(config: RunConfig, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """megatron-core's optimizer over this rank's chunks; it clips, holds fp32 main weights, and reduces over ranks."""
    device = next(parameter.device for chunk in chunks for parameter in chunk.parameters())
    _take(_inner_optimizer(config.optimizer, device))
    if _FUSED_ADAM is None or device.type != "cuda":
        _stand_in_for_fused_scale()
    settings = config.optimizer
    core = megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=config.training.lr,
        min_lr=config.schedule.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=config.training.precision != "fp32",
        fp8_recipe=config.fp8.recipe if config.training.precision == "fp8" else None,
        params_dtype=DTYPES[config.training.precision],
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    return megatron_optimizer.get_megatron_optimizer(
        core,
        list(chunks),
        config_overrides={
            **megatron_optimizer.get_standard_config_overrides(core),
            **_embedding_group(settings, config.model.tie_word_embeddings),
        },
        use_gloo_process_groups=False,
    )


def _embedding_group(settings: OptimizerConfig, tied: bool) -> dict[megatron_optimizer.ParamKey, Any]:
    """What makes the embedding, with the last stage's copy of it, a group of its own, for `set_learning_rate`; nothing
    where it learns as the rest does. start_wd and end_wd: megatron-core's names of a group's own weight decay."""
    own: dict[str, float] = {}
    if settings.embedding_weight_decay is not None:
        own |= {"start_wd": settings.embedding_weight_decay, "end_wd": settings.embedding_weight_decay}
    if settings.embedding_lr_mult != 1.0:
        own |= {"lr_mult": settings.embedding_lr_mult}
    if not own:
        return {}
    names = (EMBEDDING, HEAD) if tied else (EMBEDDING,)
    embedding = megatron_optimizer.ParamWithNamePredicate("embedding", lambda _, name: name.endswith(names))
    return {megatron_optimizer.ParamKey(with_name_predicate=embedding): own}


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Before a step: each group's rate, and the decay of the groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = group.get("end_wd", weight_decay) * group.get("wd_mult", 1.0)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global L2 norm of a step's gradients, which stay as they are, in the way of megatron-core's `optimizer.step`: its
    first half. Not finite where any gradient is not. Every rank calls it; ranks of one model-parallel group (all ranks
    with the distributed optimizer) get the same."""
    if optimizer.prepare_grads():
        return math.inf
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, norm: float, clip_grad: float) -> None:
    """The second half: scale the gradients to `clip_grad` where their `norm` is above it (0: never), and update the
    weights. Every rank calls it."""
    if clip_grad > 0.0:
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            if parameters := one.get_parameters():
                clip_grads.clip_grad_by_total_norm_fp32(parameters, clip_grad, norm)
    optimizer.step_with_ready_grads()


def _take(adam: type[torch.optim.Optimizer]) -> None:
    """Make `adam` the class of megatron-core's inner optimizer, for which it offers no argument, only these names,
    bound at import. Where it is ours, it is taken for Apex's FusedAdam, whose state it has."""
    megatron_optimizer.Adam = distrib_optimizer.Adam = adam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = adam.__module__.startswith("transformer_engine")
    distrib_optimizer.USING_APEX_OPTIMIZER = not distrib_optimizer.USING_TE_OPTIMIZER


def _stand_in_for_fused_scale() -> None:
    """Clipping and copying gradients without a copy of the largest of them, as amp_C's kernel does."""
    for module in (clip_grads, megatron_base_optimizer):
        module.multi_tensor_scale_impl = _scale


def _scale(_chunk_size: int, _overflow: Any, tensor_lists: Sequence[Sequence[torch.Tensor]], scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)

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

from illada_megatron.config import ParallelConfig, RunConfig
from illada_megatron.config.parameters import EMBEDDING, HEAD
from illada_megatron.config.schema import OptimizerConfig
from illada_megatron.model.transformer_config import DTYPES


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that counts its steps in the param group, as Apex's and TE's FusedAdam do.

    megatron-core falls back to torch.optim.AdamW where neither is installed; that one keeps `step` with each parameter,
    and a distributed optimizer's state could then not be loaded under another layout. The arithmetic is torch's own
    fused kernel.
    """

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
            if not params:
                continue
            for parameter in params:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            adamw(
                params,
                [parameter.grad for parameter in params],
                [self.state[parameter]["exp_avg"] for parameter in params],
                [self.state[parameter]["exp_avg_sq"] for parameter in params],
                [],
                [torch.tensor(group["step"] - 1.0, device=parameter.device) for parameter in params],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def optimizer_name(parallel: ParallelConfig) -> str:
    """For the start-up table."""
    kind = "AdamW (torch fused kernel)" if _uses_own_adamw() else "FusedAdam (Transformer Engine or Apex)"
    return f"{kind}, state sharded over data parallel" if parallel.use_distributed_optimizer else kind


def build_optimizer(config: RunConfig, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """megatron-core's optimizer over this rank's chunks; it clips, holds fp32 main weights, and reduces over ranks."""
    if _uses_own_adamw():
        _stand_in_for_fused_adam()
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


def _uses_own_adamw() -> bool:
    return megatron_optimizer.USING_PYTORCH_OPTIMIZER or megatron_optimizer.Adam is AdamW


def _stand_in_for_fused_adam() -> None:
    """Make `AdamW` what Apex's FusedAdam would be. megatron-core offers no argument for the class of its inner
    optimizer, only these names, found at import."""
    megatron_optimizer.Adam = distrib_optimizer.Adam = AdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _stand_in_for_fused_scale() -> None:
    """Clipping and copying gradients without a copy of the largest of them, as amp_C's kernel does."""
    for module in (clip_grads, megatron_base_optimizer):
        module.multi_tensor_scale_impl = _scale


def _scale(_chunk_size: int, _overflow: Any, tensor_lists: Sequence[Sequence[torch.Tensor]], scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)

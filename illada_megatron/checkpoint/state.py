"""What of the whole model's state this rank holds: its parameters, and the ranges of the optimizer's tensors.

Under every layout a rank holds flat ranges of its parameters' tensors: all of them, or with the distributed optimizer
the part that its data-parallel rank updates. A range becomes at most three boxes of the whole tensor (the end of a row,
whole rows, the beginning of one), so a checkpoint has no trace of the layout and nothing is gathered to write it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

from illada_megatron.checkpoint.files.names import EMA, MOMENTS
from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import EMBEDDING, Parameter, canonical_name, parameters


@dataclass(frozen=True)
class Box:
    """A part of a rank's own tensor, and where it lies in the whole tensor."""

    start: int
    stop: int
    """Of the rank's own tensor, flattened."""
    shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """A parameter as this rank holds it."""

    parameter: Parameter
    """Of the whole model."""
    tensor: nn.Parameter
    first_copy: bool
    """No other tensor- or pipeline-parallel rank writes it: it is divided, or this rank is the first to hold it."""

    @property
    def is_quantized(self) -> bool:
        """Its elements are FP8 and their factors (fp8.param_gather); what is saved of it comes from the main weight."""
        return is_float8tensor(self.tensor)

    def boxes(self, start: int = 0, stop: int | None = None) -> list[Box]:
        """Where the elements [start, stop) of this rank's flattened tensor lie in the whole tensor."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        return list(boxes(self.parameter, rank, size, start, self.tensor.numel() if stop is None else stop))


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that this rank's optimizer updates."""

    start: int
    stop: int
    """Of the rank's own tensor, flattened."""
    main: Tensor
    """[stop - start] fp32 (or the shape of the whole tensor); the weight itself where that is fp32."""
    moments_dtype: torch.dtype
    state: dict[str, Any]
    """The inner optimizer's: the moments in the shape of `main`; empty before the first step. Beside them the weight's
    moving average, where the run keeps one (`start_ema`)."""


def boxes(parameter: Parameter, rank: int, size: int, start: int, stop: int) -> Iterator[Box]:
    """The boxes of the whole `parameter` that elements [start, stop) of the flattened tensor of tensor-parallel rank
    `rank` of `size` are, in their order."""
    for first_row, shape, offset in parameter.held(rank, size):
        width = math.prod(shape[1:])
        begin = first_row * width
        at, end = max(start, begin), min(stop, begin + math.prod(shape))
        while at < end:
            row, column = divmod(at - begin, width)
            if column or end - at < width:  # a part of one row
                count = min(width - column, end - at)
                box_shape: tuple[int, ...] = (1, count)
                box_offset: tuple[int, ...] = (offset[0] + row, offset[1] + column)
            else:
                rows = (end - at) // width
                count = rows * width
                box_shape, box_offset = (rows, *shape[1:]), (offset[0] + row, *offset[1:])
            yield Box(at, at + count, box_shape, box_offset)
            at += count


def held_parameters(chunks: Sequence[nn.Module], model: ModelConfig) -> list[Held]:
    """This rank's parameters, in the order of its chunks."""
    known = {parameter.name: parameter for parameter in parameters(model)}
    first_of_tensor_group = parallel_state.get_tensor_model_parallel_rank() == 0
    held = []
    for chunk in chunks:
        for name, tensor in chunk.named_parameters():
            parameter = known[canonical_name(name, chunk.layer_offset, model.tie_word_embeddings)]  # type: ignore[arg-type]
            expected = parameter.held_shape(parallel_state.get_tensor_model_parallel_world_size())
            assert tuple(tensor.shape) == expected, f"{name} has shape {tuple(tensor.shape)}, expected {expected}"
            # the last stage keeps a copy of the embedding for the tied head
            tied_copy = parameter.name == EMBEDDING and name != EMBEDDING
            divided = parameter.split is not None
            held.append(Held(parameter, tensor, not tied_copy and (divided or first_of_tensor_group)))
    return held


def optimizer_shards(optimizer: MegatronOptimizer, held: Sequence[Held]) -> dict[str, Shard]:
    """What this rank's optimizer updates, by the parameter's name; with the distributed optimizer a rank may have no
    part of a parameter."""
    shards: dict[str, Shard] = {}
    for one in optimizers(optimizer):
        for item in held:
            shard = _distributed(one, item) if isinstance(one, DistributedOptimizer) else _plain(one, item)
            if shard is not None:
                shards[item.parameter.name] = shard
    return shards


def optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """megatron-core chains several, one for each kind of parameter."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def adam_steps(optimizer: MegatronOptimizer) -> int:
    """Steps that Adam has done, which correct the bias of its moments."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


def set_adam_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """As if Adam had done so many."""
    for group in optimizer.param_groups:
        group["step"] = steps


def _distributed(one: DistributedOptimizer, item: Held) -> Shard | None:
    if item.tensor not in one.model_param_gbuf_map:
        return None
    owned = one._get_model_param_range_map(item.tensor)["param"]
    group, order = one.model_param_group_index_map[item.tensor]
    main = one.optimizer.param_groups[group]["params"][order]
    return Shard(owned.start, owned.end, main, _moments_dtype(one), one.optimizer.state[main])


def _plain(one: Any, item: Held) -> Shard | None:
    main = getattr(item.tensor, "main_param", item.tensor)
    inner = one.optimizer
    if not any(main is parameter for group in inner.param_groups for parameter in group["params"]):
        return None
    return Shard(0, item.tensor.numel(), main, _moments_dtype(one), inner.state[main])


def _moments_dtype(one: Any) -> torch.dtype:
    return getattr(one.optimizer, "moments_dtype", torch.float32)  # fp32: TE's and Apex's, as they are used here


def fill_moments(shard: Shard) -> None:
    """Give a shard the moments that its first step would have made."""
    for moment in MOMENTS:
        if moment not in shard.state:
            shard.state[moment] = torch.zeros_like(shard.main, dtype=shard.moments_dtype)


def start_ema(shard: Shard) -> Tensor:
    """Let the moving average of a shard's weight begin at the weight, wherever it was; returns it."""
    fill_moments(shard)  # the inner optimizer makes them where a weight has no state at all
    if EMA not in shard.state:
        shard.state[EMA] = torch.empty_like(shard.main, dtype=torch.float32)
    return shard.state[EMA].copy_(shard.main.detach())

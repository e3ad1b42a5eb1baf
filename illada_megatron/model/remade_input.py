"""Linear layers of the local layer spec: they sum their weight's gradient in fp32, and do not keep their input for the
backward pass where it is cheap to make again.

A norm keeps what it normalises and SwiGLU its gate and up; a linear layer behind them would keep their results too, a
third of a layer's activations. The results are marked with how they are made, and the layer behind makes its input
again when its weight's gradient asks for it: one pass over memory each.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from illada_megatron.model.main_grad import SumsInMainGrad


def remakeable(result: Tensor, remake: Callable[[], Tensor]) -> Tensor:
    """Marks result. remake: makes the same bits again, from tensors that are kept in any case."""
    if torch.is_grad_enabled():
        result.remake = remake  # type: ignore[attr-defined]
    return result


class _RemakesInput:
    """Of a megatron-core linear layer: keeps nothing of an input that is marked."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        remake = getattr(input_, "remake", None)
        if remake is None:
            return super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        address = input_.data_ptr()

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved.data_ptr() == address else saved

        def unpack(packed: Tensor | None) -> Tensor:
            with torch.no_grad():
                return remake() if packed is None else packed

        with saved_tensors_hooks(pack, unpack):
            return super().forward(input_, *args, **kwargs)  # type: ignore[misc]


class ColumnLinear(SumsInMainGrad, _RemakesInput, ColumnParallelLinear):
    """megatron-core's, behind a norm."""


class RowLinear(SumsInMainGrad, _RemakesInput, RowParallelLinear):
    """megatron-core's, behind SwiGLU or attention."""

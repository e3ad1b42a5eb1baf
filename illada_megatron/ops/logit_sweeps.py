"""How a chunk's logits, their statistics and the three products around them are computed: two sweeps over the head.

    forward     Z = X W^T, and three numbers of each row of Z     X [c, h] hidden states, W [v/tp, h]
    backward    G = d loss / d Z, then dX = G W and dW += G^T X

`plain_sweeps` make each of these of one product or pass after the other, on any device. `BLOCK_SWEEPS` do it for a
block of the head's rows at a time, which then stays in a CPU's cache
(csrc/masked_cross_entropy/cpu_kernels_head_blocks.cpp).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from illada_megatron.ops import kernels
from illada_megatron.ops.add_product import add_product_
from illada_megatron.ops.logit_passes import REFERENCE, LogitPasses, combine, fused_passes

# Rows of a chunk start on 64 bytes where they lie one after the other, and their number fills the tiles of a product
_ALIGN_ELEMENTS = 64
ALIGN_ROWS = 32


Logits = Tensor | tuple["Logits", ...]
"""Of a chunk, in one piece or several."""


class Sweeps(NamedTuple):
    """An implementation of both."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Logits, Tensor]]
    """(memory, hidden `[c, h]`, weight `[v, h]`, targets `[c]`, softcap) -> (logits in some layout, a view of memory;
    statistics `[3, c]` as `LogitPasses.statistics`)."""
    backward: Callable[[Any, Tensor, Tensor, Tensor, Tensor, float, Tensor, Tensor], None]
    """(logits, which it may overwrite, hidden, weight, targets, row_values `[4, c]` as `LogitPasses.to_gradient_`,
    softcap, hidden's gradient `[c, h]`, written, weight's gradient `[v, h]`, added to)."""
    parts: int = 1
    """In which it takes the head's rows."""


def chosen_sweeps(hidden: Tensor, weight: Tensor, fused: bool, excluded_row: int | None = None) -> Sweeps:
    """Of hidden `[m, h]` and weight `[v, h]`, of which one row may take no part."""
    if excluded_row is not None:
        return without_row(chosen_sweeps(hidden, weight, fused), excluded_row)
    if not fused:
        return plain_sweeps(REFERENCE)
    in_blocks = (
        hidden.device.type == "cpu"
        and hidden.shape[1] % 2 == 0
        and weight.is_contiguous()
        and kernels.has_cpu_products(hidden.dtype)
    )
    return BLOCK_SWEEPS if in_blocks else plain_sweeps(fused_passes())


def memory_elements(rows: int, width: int, parts: int = 1) -> int:
    """Of the memory of a chunk of `rows` logits of `width`, in any layout; each of its parts is filled up by itself."""
    return _aligned(rows, ALIGN_ROWS) * (_aligned(width, _ALIGN_ELEMENTS) + (parts - 1) * _ALIGN_ELEMENTS)


def plain_sweeps(passes: LogitPasses) -> Sweeps:
    """Products of torch's and passes over logits `[c, v]`."""

    def forward(
        memory: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float
    ) -> tuple[Tensor, Tensor]:
        rows, width = hidden.shape[0], weight.shape[0]
        stride = _aligned(width, _ALIGN_ELEMENTS)
        padded = _aligned(rows, ALIGN_ROWS)
        lines = memory[: padded * stride].view(padded, stride)
        # With AMX, oneDNN multiplies what lies beyond a strided operand's end by zero: NaN where nobody has written
        lines[:, width:] = 0
        lines[rows:] = 0
        logits = lines[:rows, :width]
        torch.mm(hidden, weight.T, out=logits)
        return logits, passes.statistics(logits, targets, softcap)

    def backward(
        logits: Tensor,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_values: Tensor,
        softcap: float,
        hidden_gradient: Tensor,
        weight_gradient: Tensor,
    ) -> None:
        passes.to_gradient_(logits, targets, row_values, softcap)
        torch.mm(logits, weight, out=hidden_gradient)
        add_product_(weight_gradient, logits.T, hidden)

    return Sweeps(forward, backward)


def _forward_in_blocks(
    memory: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    width, lanes = weight.shape[0], _aligned(hidden.shape[0], ALIGN_ROWS)
    logits = memory[: width * lanes].view(width, lanes)
    return logits, torch.ops.illada.logits_in_blocks(logits, hidden, weight, targets, softcap)


def _backward_in_blocks(*arguments: Tensor | float) -> None:
    torch.ops.illada.gradients_in_blocks(*arguments)


BLOCK_SWEEPS = Sweeps(_forward_in_blocks, _backward_in_blocks)


def without_row(sweeps: Sweeps, row: int) -> Sweeps:
    """The same over a head that lacks its row `row`: over what stands above it and what stands below, whose statistics
    are put together as those of ranks are. No implementation has to know, and no logit is computed to be left out.

    In 16 bits hidden's gradient is the sum of two rounded ones.
    """

    def around(weight: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(weight[:row], targets), (weight[row + 1 :], targets - row - 1)]  # -1 and below: held elsewhere

    def forward(
        memory: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float
    ) -> tuple[Logits, Tensor]:
        logits, statistics, first = [], [], 0
        for part, part_targets in around(weight, targets):
            one, numbers = sweeps.forward(memory[first:], hidden, part, part_targets, softcap)
            logits.append(one)
            statistics.append(numbers)
            first += memory_elements(hidden.shape[0], part.shape[0])
        return tuple(logits), combine(torch.stack(statistics))

    def backward(
        logits: Logits,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_values: Tensor,
        softcap: float,
        hidden_gradient: Tensor,
        weight_gradient: Tensor,
    ) -> None:
        parts = zip(logits, around(weight, targets), (weight_gradient[:row], weight_gradient[row + 1 :]), strict=True)
        gradients = (hidden_gradient, torch.empty_like(hidden_gradient))
        for (one, (part, part_targets), sums), gradient in zip(parts, gradients, strict=True):
            sweeps.backward(one, hidden, part, part_targets, row_values, softcap, gradient, sums)
        hidden_gradient.add_(gradients[1])

    return Sweeps(forward, backward, parts=2)


def _aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple

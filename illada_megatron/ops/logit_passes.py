"""The two passes over a chunk of logits, compiled or in plain torch, and how parts of a row's statistics combine.

With z = softcap * tanh(logit / softcap) (z = logit without a softcap), log Z_i = log sum_j exp(z_ij) and
p_ij = exp(z_ij - log Z_i):

    CE_i   = log Z_i - z_i,label                                          arXiv 2502.09992, eq. 3
    loss_i = w_i (CE_i + c (log Z_i)^2)                                   z-loss: arXiv 2204.02311, section 5
    d loss_i / d logit_ij = [a_i p_ij - b_i (j = label)] (1 - (z_ij / softcap)^2)
                            with a_i = w_i (1 + 2 c log Z_i), b_i = w_i
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the reference's fp32 temporary: rows are turned to fp32 in pieces of at most this many (64 MiB)
_PIECE_ELEMENTS = 1 << 24


class LogitPasses(NamedTuple):
    """An implementation of both, over logits `[m, v]` and targets `[m]` int64 (outside of `[0, v)`: held elsewhere)."""

    statistics: Callable[[Tensor, Tensor, float], Tensor]
    """(logits, targets, softcap) -> `[3, m]`: maximum of z, sum of exp(z - maximum), z of the target or -inf. fp32
    (reference: fp64 for fp64 logits)."""
    to_gradient_: Callable[[Tensor, Tensor, Tensor, float], None]
    """(logits, targets, row_values, softcap): overwrites the logits with the gradient above. row_values `[4, m]`, in
    the statistics' dtype: maximum, log of the sum, a, b. log Z comes in these two parts because z - maximum is exact
    where it matters and z - log Z would be rounded at the size of z."""


def reference_statistics(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """`LogitPasses.statistics` in plain torch, on any device."""
    m, width = logits.shape
    result = torch.zeros(3, m, dtype=statistics_dtype(logits.dtype), device=logits.device)
    largest, exp_sum, label_logit = result
    largest.fill_(-torch.inf)
    label_logit.fill_(-torch.inf)
    for piece in _pieces(m, width):
        values = _capped_(logits[piece].to(result.dtype, copy=True), softcap)
        held, column = _held_columns(targets[piece], width)
        label_logit[piece] = torch.where(held, values.gather(1, column).squeeze(1), -torch.inf)
        largest[piece] = values.amax(1)
        # a row of -inf only: exp(-inf - 0) = 0 instead of exp(-inf + inf)
        shift = torch.where(largest[piece] == -torch.inf, 0.0, largest[piece])
        exp_sum[piece] = values.sub_(shift[:, None]).exp_().sum(1)
    return result


def reference_to_gradient_(logits: Tensor, targets: Tensor, row_values: Tensor, softcap: float) -> None:
    """`LogitPasses.to_gradient_` in plain torch, on any device."""
    m, width = logits.shape
    for piece in _pieces(m, width):
        maximum, log_sum, a, b = row_values[:, piece, None]
        values = _capped_(logits[piece].to(row_values.dtype, copy=True), softcap)
        slope = 1 - (values / softcap).square_() if softcap > 0 else None
        values.sub_(maximum).sub_(log_sum)
        held, column = _held_columns(targets[piece], width)
        label = values.gather(1, column)
        values.exp_().mul_(a)
        # a p - b without the cancellation where p is near 1
        label_value = b * label.expm1() + (a - b) * label.exp()
        values.scatter_(1, column, torch.where(held[:, None], label_value, values.gather(1, column)))
        logits[piece] = values if slope is None else values.mul_(slope)


REFERENCE = LogitPasses(reference_statistics, reference_to_gradient_)


def fused_passes() -> LogitPasses:
    """The compiled passes; `ops.kernels.missing` says where they cannot run."""
    return LogitPasses(torch.ops.illada.logit_statistics, torch.ops.illada.logits_to_gradient_)


def combine(parts: Tensor) -> Tensor:
    """Statistics of whole rows `[3, m]` from those of parts of their columns, `[k, 3, m]` (slabs, or ranks' ranges)."""
    largest = parts[:, 0].amax(0)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    exp_sum = (parts[:, 1] * (parts[:, 0] - shift).exp()).sum(0)
    return torch.stack((largest, exp_sum, parts[:, 2].amax(0)))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _capped_(values: Tensor, softcap: float) -> Tensor:
    return values.div_(softcap).tanh_().mul_(softcap) if softcap > 0 else values


def _held_columns(targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Whether these columns hold each label, `[m]`, and the one it has, `[m, 1]` (column 0 where they do not)."""
    held = (targets >= 0) & (targets < width)
    return held, torch.where(held, targets, 0)[:, None]


def _pieces(m: int, width: int) -> list[slice]:
    """Row ranges whose fp32 copy is small; none where this rank's rows of the head are all padding."""
    if width == 0:
        return []
    step = max(1, _PIECE_ELEMENTS // width)
    return [slice(start, min(start + step, m)) for start in range(0, m, step)]

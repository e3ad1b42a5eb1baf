"""The most probable token of each row of logits, and how probable it is: what every step of generation asks of every
mask. Compiled on a CPU (csrc/generation/largest.h), of torch's operators elsewhere."""

import torch
from torch import Tensor

from illada_megatron.ops import kernels

_GROUP = 64  # neighbouring tokens, of which a library finds the largest, or the sum, in one sweep
_CACHED, _ON_GPU = 1 << 18, 1 << 23  # logits worked on at one time: 1 MB; 32 MB, and 64 in float64


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [m, v] -> ([m] int64, [m] float64): the token of the largest logit, of equals the first, NaN being larger
    than all; and what the others' exponentials are together where that of the largest is 1, so that its probability is
    1 / (1 + rest).

    Exponentials are of the logits' precision, few are added up in it, and the sums of these in float64: 1 - p is exact
    to some 1e-8 of itself, where a sum in fp32 would change which of two rows is surer. Compiled or of torch, a row
    does not depend on the others.
    """
    if logits.dtype == torch.float32 and kernels.missing("largest", logits.device) is None:
        index, rest = torch.ops.illada.largest(logits)
        return index, rest
    return by_torch(logits)


def by_torch(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `largest`."""
    logits = logits.contiguous()  # the order of sums is that of memory
    index = _index(logits)
    most = logits.gather(1, index[:, None])
    rows = rows_at_once(logits)
    pieces = zip(logits.split(rows), most.split(rows), index.split(rows), strict=True)
    rest = [_sum((some - top).exp_().scatter_(1, at[:, None], 0.0)) for some, top, at in pieces]
    return index, torch.cat(rest) if rest else logits.new_empty(0, dtype=torch.float64)


def rows_at_once(logits: Tensor) -> int:
    """Of [m, v], to be worked on at one time: what is made of them on the way is several times as large. On a CPU as
    many as stay in its cache."""
    return max(1, (_CACHED if logits.device.type == "cpu" else _ON_GPU) // logits.shape[1])


def _index(logits: Tensor) -> Tensor:
    """As argmax, which is slow on a CPU: the group with the largest is found first."""
    whole = logits.shape[1] // _GROUP * _GROUP
    groups = [logits[:, :whole].unflatten(1, (-1, _GROUP)).amax(-1)]
    if whole < logits.shape[1]:
        groups.append(logits[:, whole:].amax(-1, keepdim=True))
    first = torch.cat(groups, dim=1).argmax(-1, keepdim=True) * _GROUP
    tokens = (first + torch.arange(_GROUP, device=logits.device)).clamp_max(logits.shape[1] - 1)
    return (first + logits.gather(1, tokens).argmax(-1, keepdim=True)).squeeze(1)


def _sum(values: Tensor) -> Tensor:
    """[m, v] -> [m] float64: of each group in the values' precision, then of the groups; what is left in float64."""
    whole = values.shape[1] // _GROUP * _GROUP
    groups = values[:, :whole].unflatten(1, (-1, _GROUP)).sum(-1)
    return groups.sum(-1, dtype=torch.float64) + values[:, whole:].sum(-1, dtype=torch.float64)

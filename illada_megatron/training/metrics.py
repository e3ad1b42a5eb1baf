"""Sums over a step's tokens, reduced once over all ranks, and what is reported of them."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from illada_megatron.diffusion import MaskedBatch
from illada_megatron.ops.masked_linear_cross_entropy import MaskedLoss

T_BUCKETS = 10
_SCALARS = ("weighted", "cross_entropy", "masked", "squared_lengths", "stop", "bad_gradient", "bound")


@dataclass(frozen=True)
class StepSums:
    """Sums over all tokens of a step, the same on every rank."""

    weighted: float
    """sum of weighted CE over masked tokens (nats): the objective."""
    bound: float
    """the same with the weights of the bound, which the objective's are by default: sum of CE / p."""
    cross_entropy: float
    """sum of CE over masked tokens (nats)."""
    masked: int
    squared_lengths: int
    """sum over segments of length^2 (tokens^2)."""
    stop: bool
    """Some rank wants to stop."""
    bad_gradient: bool
    """Some rank found a gradient norm that is not finite."""
    bucket_cross_entropy: list[float]
    bucket_masked: list[float]

    @property
    def masked_cross_entropy(self) -> float:
        """Mean CE of a masked token, unweighted (nats)."""
        return self.cross_entropy / max(1, self.masked)

    def cross_entropy_by_t(self) -> list[float | None]:
        """Mean CE of the masked tokens of sequences (or segments) with t in [k/10, (k+1)/10); None: there were none."""
        pairs = zip(self.bucket_cross_entropy, self.bucket_masked, strict=True)
        return [total / count if count else None for total, count in pairs]


def microbatch_sums(loss: MaskedLoss, batch: MaskedBatch, counted: int) -> Tensor:
    """One micro-batch's sums as a float64 vector: the scalars of StepSums, then CE and counts by bucket of t.

    counted: samples that count; those behind them fill the step up, without weight.
    """
    ce = loss.cross_entropy.double()
    ends = batch.cu_seqlens[1:]
    lengths = (ends - batch.cu_seqlens[:-1]).double() * (ends <= counted * batch.tokens.shape[1])
    sums = torch.zeros(len(_SCALARS) + 2 * T_BUCKETS, dtype=torch.float64, device=ce.device)
    sums[0] = loss.weighted_cross_entropy  # without the z-loss: the bound that runs compare
    sums[1] = ce.sum()
    sums[2] = ce.numel()
    sums[3] = lengths.square().sum()
    sums[6] = sums[0]
    if batch.bound_weight is not None:
        sums[6] = torch.dot(batch.bound_weight.view(-1)[loss.rows].double(), ce)
    t, owner = batch.t, loss.rows // batch.tokens.shape[1]
    if batch.segment_t is not None:
        t, owner = batch.segment_t, torch.searchsorted(ends, loss.rows.to(ends.dtype), right=True)
    bucket = (t * T_BUCKETS).long().clamp(max=T_BUCKETS - 1)[owner]
    sums[len(_SCALARS) :][:T_BUCKETS].index_add_(0, bucket, ce)
    sums[len(_SCALARS) + T_BUCKETS :].index_add_(0, bucket, torch.ones_like(ce))
    return sums


def reduce_sums(
    local: list[Tensor],
    counts: bool,
    device: torch.device,
    stop: bool = False,
    bad_gradient: bool = False,
    context: int = 1,
) -> StepSums:
    """Sum over micro-batches and all ranks: the one collective of a step that metrics cost.

    local: the vectors of this rank's micro-batches (last stage), else empty; counts: whether this rank speaks for its
    tensor-parallel group, whose ranks all hold the same sums; stop: whether this rank wants to stop; bad_gradient:
    whether it found a gradient norm that is not finite; context: context-parallel ranks, each of which has counted its
    own masked tokens, but all segments.
    """
    total = torch.zeros(len(_SCALARS) + 2 * T_BUCKETS, dtype=torch.float64, device=device)
    if counts and local:
        total += torch.stack(local).sum(0)
    total[4], total[5] = float(stop), float(bad_gradient)
    dist.all_reduce(total)
    values = total.tolist()
    buckets = values[len(_SCALARS) :]
    return StepSums(
        weighted=values[0],
        bound=values[6],
        cross_entropy=values[1],
        masked=round(values[2]),
        squared_lengths=round(values[3] / context),
        stop=values[4] > 0,
        bad_gradient=values[5] > 0,
        bucket_cross_entropy=buckets[:T_BUCKETS],
        bucket_masked=buckets[T_BUCKETS:],
    )

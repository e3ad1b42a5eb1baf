"""A step's sums against loops over its tokens."""

import pytest
import torch

from illada_megatron.config import RunConfig
from illada_megatron.diffusion import MaskedBatch
from illada_megatron.ops.masked_linear_cross_entropy import MaskedLoss
from illada_megatron.runtime import Runtime
from illada_megatron.training.metrics import T_BUCKETS, microbatch_sums, reduce_sums

TIMES = [0.05, 0.1, 0.15, 0.999, 1.0, 0.55]
LENGTH = 9


def _step(seed: int) -> tuple[MaskedLoss, MaskedBatch]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(len(TIMES), LENGTH, generator=generator) + 0.5
    weight *= torch.rand(weight.shape, generator=generator) < 0.6
    weight[2] = 0.0  # a sequence without a mask
    rows = weight.view(-1).nonzero().squeeze(1)
    ce = torch.rand(len(rows), generator=generator) * 5
    offsets = [0, 4, 9, 18, 27, 36, 45, 54]  # the first sequence is split
    batch = MaskedBatch(
        tokens=torch.zeros(len(TIMES), LENGTH, dtype=torch.int64),
        labels=torch.zeros(len(TIMES), LENGTH, dtype=torch.int64),
        loss_weight=weight,
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        max_seqlen=LENGTH,
        t=torch.tensor(TIMES),
        sample_index=torch.arange(len(TIMES)),
    )
    weighted = torch.dot(weight.view(-1)[rows], ce)
    return MaskedLoss(weighted + 1.0, weighted, ce, rows), batch  # a z-loss of 1 must not be reported as loss


def test_sums_equal_loops_over_tokens(tiny_config: RunConfig, single_process: Runtime) -> None:
    """A token counted in another sequence's bucket, t = 1 outside the last bucket, a split counted as one segment."""
    steps = [_step(0), _step(1)]
    local = [microbatch_sums(*step, counted=len(TIMES)) for step in steps]
    sums = reduce_sums(local, counts=True, stop=False, device=torch.device("cpu"))

    weighted = total = masked = 0.0
    by_bucket: list[list[float]] = [[] for _ in range(T_BUCKETS)]
    for loss, batch in steps:
        for row, ce in zip(loss.rows.tolist(), loss.cross_entropy.tolist(), strict=True):
            sequence, position = divmod(row, LENGTH)
            weighted += float(batch.loss_weight[sequence, position]) * ce
            total += ce
            masked += 1
            by_bucket[min(9, int(TIMES[sequence] * 10))].append(ce)
    assert sums.weighted == pytest.approx(weighted, rel=1e-6)
    assert sums.masked == masked
    assert sums.masked_cross_entropy == pytest.approx(total / masked)
    assert sums.squared_lengths == 2 * (4**2 + 5**2 + 5 * 9**2)
    assert [len(bucket) for bucket in by_bucket] == sums.bucket_masked
    expected = [sum(bucket) / len(bucket) if bucket else None for bucket in by_bucket]
    assert [bucket for bucket in range(T_BUCKETS) if expected[bucket] is not None] == [0, 1, 5, 9]
    for ours, theirs in zip(sums.cross_entropy_by_t(), expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours == pytest.approx(theirs)


def test_samples_that_fill_a_step_up_are_no_work(single_process: Runtime) -> None:
    """Their segments would be in the FLOPs, and so in the MFU."""
    loss, batch = _step(0)
    sums = reduce_sums([microbatch_sums(loss, batch, counted=2)], counts=True, device=torch.device("cpu"))
    assert sums.squared_lengths == 4**2 + 5**2 + 9**2


def test_only_one_rank_of_a_tensor_group_speaks(single_process: Runtime) -> None:
    local = [microbatch_sums(*_step(0), counted=len(TIMES))]
    shared = reduce_sums(local * 2, counts=True, device=torch.device("cpu"), context=2)
    alone = reduce_sums(local, counts=True, device=torch.device("cpu"))
    assert shared.squared_lengths == alone.squared_lengths  # both ranks count all segments
    assert shared.masked == 2 * alone.masked
    silent = reduce_sums(local, counts=False, stop=False, device=torch.device("cpu"))
    assert (silent.weighted, silent.masked, silent.stop) == (0.0, 0, False)
    assert silent.masked_cross_entropy == 0.0
    assert silent.cross_entropy_by_t() == [None] * T_BUCKETS


def test_silent_rank_still_asks_to_stop(single_process: Runtime) -> None:
    """SIGTERM may reach a rank of the first stage, or the second of a tensor-parallel group."""
    assert reduce_sums([], counts=False, stop=True, device=torch.device("cpu")).stop
    spoken = reduce_sums(
        [microbatch_sums(*_step(0), counted=len(TIMES))], counts=True, stop=True, device=torch.device("cpu")
    )
    assert spoken.stop
    assert spoken.masked > 0

"""Loss weights, noise schedules, a range of t, t per segment, complementary masks: each is what it says, and the bound
is a bound whatever they are."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from toy import MASK, SEED, SIZES, SUMS, TEXT, L, OneText, draw_losses, exact_bound

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion import (
    MaskedBatch,
    make_masked_batch,
    make_segments,
    mask_probability,
    sample_boundary,
    sample_t,
    sample_times,
    words,
)

BOTH = ("bernoulli", "exact_count")


class Windows:
    """`[s]` ids, the same for `samples_per_window` consecutive samples, with documents of about eight tokens."""

    def __init__(self, sequence_length: int, samples_per_window: int = 1) -> None:
        self.sequence_length, self.each = sequence_length, samples_per_window

    def read(self, sample_indices: Sequence[int], out: np.ndarray) -> None:
        for row, index in zip(out, sample_indices, strict=True):
            row[:] = 6 + (words(0, "text", index // self.each, self.sequence_length) % np.uint64(1000)).astype(np.int64)

    def document_starts(self, sample_index: int) -> np.ndarray:
        starts = words(0, "documents", sample_index // self.each, self.sequence_length - 1) < np.uint64(1 << 61)
        return 1 + np.flatnonzero(starts)


def batch_of(indices: Sequence[int], s: int = 64, seed: int = SEED, **fields: Any) -> MaskedBatch:
    config = DiffusionConfig(**fields)
    return make_masked_batch(Windows(s, config.samples_per_window), indices, config, MASK, seed)


def standard_error(losses: np.ndarray) -> float:
    """Of the mean, from blocks that are independent for every sampler."""
    means = losses.reshape(-1, 16).mean(1)
    return float(means.std(ddof=1) / math.sqrt(len(means)))


def test_defaults_draw_what_they_always_drew() -> None:
    """Checkpoints of earlier versions go on with the same noise, bit for bit."""
    digest = hashlib.sha256()
    for t, mask, boundary in itertools.product(
        ("uniform", "stratified", "antithetic"), BOTH, ("split", "document", "truncate", "none")
    ):
        fields = {"t_sampling": t, "mask_sampling": mask, "attention_boundary": boundary, "truncate_probability": 0.5}
        batch = batch_of(range(40), **fields)
        for part in (batch.tokens, batch.labels, batch.loss_weight, batch.cu_seqlens, batch.t):
            digest.update(part.numpy().tobytes())
        assert batch.bound_weight is None
        assert batch.segment_t is None
    assert digest.hexdigest() == "88546c6c2858c385f08d89e573f302a97a82b2f50bb57e74f78ccd002f39b8bc"


@pytest.mark.parametrize("mask_sampling", BOTH)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_schedule_estimates_the_same_bound(schedule: str, mask_sampling: str) -> None:
    """A weight without its m'(t), or with p of another schedule, is off by much more."""
    config = DiffusionConfig(noise_schedule=schedule, mask_sampling=mask_sampling, attention_boundary="none", eps=0.01)
    losses = draw_losses(config, 10_000)
    expected = exact_bound(mask_sampling, 0.01)
    assert abs(losses.mean() - expected) < 4 * standard_error(losses)
    assert standard_error(losses) < 0.04 * expected


def test_schedules_begin_at_nothing_and_end_at_everything() -> None:
    t = np.linspace(0, 1, 1001)
    for schedule in ("linear", "cosine"):
        p = np.array([mask_probability(float(one), 0.0, schedule) for one in t])
        assert (p[0], p[-1]) == (pytest.approx(0, abs=1e-12), 1.0)
        assert (np.diff(p) > 0).all()
        assert mask_probability(0.0, 0.25, schedule) == pytest.approx(0.25)
        # the weights of all tokens have the mean 1: that is what m'(t) / p is
        weights = batch_of(range(4000), noise_schedule=schedule, attention_boundary="none").loss_weight.mean(1)
        assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(4000)
    assert mask_probability(1 / 3, 0.0, "cosine") == pytest.approx(0.5)  # cos(pi/3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_other_objectives_keep_the_bounds_estimate(schedule: str) -> None:
    """The masks are the same, and beside another weight stands the one of the bound."""
    shared = {"noise_schedule": schedule, "attention_boundary": "truncate", "truncate_probability": 0.5}
    plain = batch_of(range(400), **shared)
    clipped = batch_of(
        range(400), loss_weight="clipped", max_loss_weight=3.0, **{**shared, "truncate_probability": 0.0}
    )
    uncut = batch_of(range(400), **{**shared, "truncate_probability": 0.0})
    unweighted = batch_of(range(400), loss_weight="unweighted", **shared)
    for batch, bound in ((clipped, uncut), (unweighted, plain)):
        assert batch.bound_weight is not None
        assert torch.equal(batch.tokens, bound.tokens)
        assert torch.equal(batch.bound_weight, bound.loss_weight)
    assert torch.equal(clipped.loss_weight, uncut.loss_weight.clamp(max=3.0))
    assert (uncut.loss_weight > 3).any()
    mean_p = 0.999 * (0.5 if schedule == "linear" else 2 / math.pi) + 0.001
    masked = unweighted.tokens == MASK
    whole = [row for row, boundary in enumerate(unweighted.loss_weight[:, -1]) if boundary > 0]
    assert unweighted.loss_weight[whole][masked[whole]].numpy() == pytest.approx(1 / mean_p, rel=1e-5)


def test_unweighted_is_the_mean_of_masked_tokens() -> None:
    """sum(weight) / tokens is 1 on average: the loss has the size of a masked token's cross-entropy."""
    for fields in ({}, {"noise_schedule": "cosine"}, {"t_min": 0.4, "t_max": 0.5}, {"mask_sampling": "exact_count"}):
        weights = batch_of(range(4000), s=50, loss_weight="unweighted", attention_boundary="none", **fields).loss_weight
        means = weights.mean(1)
        slack = 0.01 if "mask_sampling" in fields else 0.0  # ceil: half a token of 50 more
        assert abs(means.mean() - 1) < 4 * means.std() / math.sqrt(4000) + 2 * slack


def test_a_range_of_t_is_the_mean_over_it() -> None:
    """The loss is then E[loss | t] averaged over the range: no bound, and the configuration says so."""
    for t_sampling in ("uniform", "stratified", "antithetic"):
        fields = {"t_sampling": t_sampling, "t_min": 0.3, "t_max": 0.8, "attention_boundary": "none"}
        config = DiffusionConfig(**fields)
        assert not config.loss_is_bound
        drawn = np.array([sample_t(i, config, SEED) for i in range(4000)])
        assert 0.3 <= drawn.min() < 0.301
        assert 0.799 < drawn.max() <= 0.8
        losses = draw_losses(config, 10_000)
        p = np.array([mask_probability(t, config.eps) for t in 0.3 + 0.5 * (np.arange(2000) + 0.5) / 2000])[:, None]
        expected = (p**SIZES * (1 - p) ** (L - SIZES) * SUMS / p).sum(1).mean() / L
        assert abs(losses.mean() - expected) < 4 * standard_error(losses)


@pytest.mark.parametrize("mask_sampling", BOTH)
@pytest.mark.parametrize("boundary", ["split", "document"])
def test_each_segment_has_its_own_t(boundary: str, mask_sampling: str) -> None:
    """Masked at its own rate, with the weight of it; the times of one sequence tell nothing of each other."""
    fields = {"attention_boundary": boundary, "mask_sampling": mask_sampling, "t_per": "segment"}
    s, n, config = 256, 300, DiffusionConfig(**fields, split_probability=0.9)
    batch = batch_of(range(n), s, **fields, split_probability=0.9)
    assert batch.segment_t is not None
    masked, weights = (batch.tokens == MASK).view(-1), batch.loss_weight.view(-1)
    lengths, times = batch.cu_seqlens.diff().tolist(), batch.segment_t.tolist()
    assert len(lengths) == len(times)
    start, z = 0, []
    for length, t in zip(lengths, times, strict=True):
        part = slice(start, start + length)
        count, found = int(masked[part].sum()), weights[part][masked[part]].numpy()
        if mask_sampling == "exact_count":
            assert count in {max(1, math.ceil(t * length + rounded)) for rounded in (-1e-5, 1e-5)}  # t is float32
            assert found == pytest.approx(length / count)
        else:
            p = mask_probability(t, config.eps)
            assert found == pytest.approx(1 / p, rel=1e-4)
            z.append((count - length * p) / math.sqrt(length * p * (1 - p) + 1e-9))
        start += length
    if z:
        assert abs(np.mean(z)) < 4 / math.sqrt(len(z))
    first, second = np.array([sample_times(i, 2, config, SEED) for i in range(8000)]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(8000)
    assert [sample_t(i, config, SEED) for i in range(100)] == first[:100].tolist()
    for values in (first, second):  # each uniform, and stratified in groups of eight
        assert np.array_equal(np.sort((values * 8).astype(int).reshape(-1, 8)), np.tile(np.arange(8), (1000, 1)))


@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("mask_sampling", BOTH)
def test_complements_cover_the_window_and_are_unbiased_each(mask_sampling: str, eps: float) -> None:
    fields = {"complementary_masks": True, "mask_sampling": mask_sampling, "eps": eps}
    batch = batch_of(range(400), **fields)
    assert torch.equal(batch.labels[::2], batch.labels[1::2])
    assert (batch.t[::2] + batch.t[1::2]).numpy() == pytest.approx(1.0)
    first, second = ((batch.tokens == MASK)[one::2] for one in (0, 1))
    assert (first | second).all(), "a token that is trained in neither"
    twice = (first & second).double().mean(1)
    if mask_sampling == "exact_count":
        assert set((twice * 64).tolist()) <= {0.0, 1.0}
    else:
        assert abs(twice.mean() - eps) <= 4 * math.sqrt(eps / (200 * 64))
    losses = draw_losses(DiffusionConfig(**fields, attention_boundary="none"), 12_000)
    for part in (losses[::2], losses[1::2]):
        assert abs(part.mean() - exact_bound(mask_sampling, eps)) < 4 * standard_error(part[: len(part) // 16 * 16])


@pytest.mark.parametrize("boundary", ["split", "document", "truncate"])
@pytest.mark.parametrize("t_per", ["sequence", "segment"])
def test_complements_share_their_segments(boundary: str, t_per: str) -> None:
    """Otherwise what the one leaves out would not be what the other masks; a middle stage draws the same ones."""
    fields = {"complementary_masks": True, "attention_boundary": boundary, "t_per": t_per, "truncate_probability": 0.5}
    config, text = DiffusionConfig(**fields), Windows(64, 2)
    for pair in range(100):
        one, other = (sample_boundary(2 * pair + place, text, config, SEED) for place in (0, 1))
        assert one == other
        batch = batch_of([2 * pair, 2 * pair + 1], **fields)
        masked = batch.tokens == MASK
        assert masked[:, : one.noised_tokens].any(0).all()
        assert not masked[:, one.noised_tokens :].any()
        segments, _ = make_segments([2 * pair, 2 * pair + 1], text, config, SEED)
        assert torch.equal(segments, batch.cu_seqlens)
        if batch.segment_t is not None:
            half = len(batch.segment_t) // 2
            assert (batch.segment_t[:half] + batch.segment_t[half:]).numpy() == pytest.approx(1.0)


def test_all_choices_depend_on_seed_and_sample_index_alone() -> None:
    fields = {
        "t_per": "segment",
        "loss_weight": "clipped",
        "attention_boundary": "document",
        "t_min": 0.1,
        "t_max": 0.9,
    }
    for more in ({"complementary_masks": True}, {"noise_schedule": "cosine", "mask_sampling": "exact_count"}):
        together = batch_of(range(40), **fields, **more)
        for index in (3, 39, 0, 20):
            alone = batch_of([index], **fields, **more)
            for name in ("tokens", "labels", "loss_weight", "bound_weight", "t"):
                assert torch.equal(getattr(alone, name), getattr(together, name)[[index]]), name
        assert not torch.equal(batch_of(range(40), seed=SEED + 1, **fields, **more).tokens, together.tokens)


def test_one_token_and_one_text() -> None:
    """The smallest sequences; a corpus that ignores the index."""
    for mask in BOTH:
        batch = batch_of([0, 1], s=1, mask_sampling=mask, complementary_masks=True, t_per="segment")
        assert (batch.tokens == MASK).any()
    config = DiffusionConfig(complementary_masks=True)
    assert make_masked_batch(OneText(TEXT), [4, 5], config, MASK, SEED).tokens.shape == (2, L)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t_min": 0.5, "t_max": 0.5}, "t_min 0.5 is not below t_max 0.5"),
        ({"complementary_masks": True, "noise_schedule": "cosine"}, "needs noise_schedule linear .* found cosine"),
        ({"complementary_masks": True, "t_max": 0.9}, r"t_min \+ t_max 1, found linear and 0.0 \+ 0.9"),
        ({"loss_weight": "clipped", "max_loss_weight": 0.0}, "greater than 0"),
    ],
)
def test_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**fields)

"""MaskedBatch: purity, masks, boundaries, what is refused."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion import (
    make_masked_batch,
    make_segments,
    mask_probability,
    sample_boundary,
    sample_t,
    words,
)
from illada_megatron.ops.tensor_fields import moved_to

MASK, SEED = 5, 11


class RandomText:
    """A corpus of `[s]` ids above the mask token, a function of the sample index."""

    def __init__(self, sequence_length: int):
        self.sequence_length = sequence_length

    def __getitem__(self, sample_index: int) -> np.ndarray:
        return 6 + (words(0, "text", sample_index, self.sequence_length) % np.uint64(1000)).astype(np.int64)

    def read(self, sample_indices, out: np.ndarray) -> None:
        for row, index in zip(out, sample_indices, strict=True):
            row[:] = self[index]

    def document_starts(self, sample_index: int) -> np.ndarray:
        """About one document in eight tokens; sometimes none begins inside."""
        return 1 + np.flatnonzero(words(0, "documents", sample_index, self.sequence_length - 1) < np.uint64(1 << 61))


def config(**fields) -> DiffusionConfig:
    return DiffusionConfig(**fields)


EVERY_CONFIG = [
    config(
        t_sampling=t, mask_sampling=mask, attention_boundary=boundary, truncate_probability=0.5, split_probability=0.5
    )
    for t in ("uniform", "stratified", "antithetic")
    for mask in ("bernoulli", "exact_count")
    for boundary in ("split", "document", "truncate", "none")
]


def batch_of(indices, cfg, s=64, seed=SEED):
    return make_masked_batch(RandomText(s), indices, cfg, MASK, seed)


@pytest.mark.parametrize("cfg", EVERY_CONFIG, ids=lambda c: f"{c.t_sampling}-{c.mask_sampling}-{c.attention_boundary}")
def test_noise_depends_on_seed_and_sample_index_alone(cfg):
    """Any order, any batch size, any rank: a sample is the same. Otherwise a change of layout would change the run."""
    together = batch_of(range(40), cfg)
    shuffled = [int(i) for i in np.random.default_rng(0).permutation(40)]
    for size in (1, 3, 40):
        for start in range(0, 40, size):
            indices = shuffled[start : start + size]
            part = batch_of(indices, cfg)
            for name in ("tokens", "labels", "loss_weight", "t", "sample_index"):
                assert torch.equal(getattr(part, name), getattr(together, name)[indices]), name
    other = batch_of(range(40), cfg, seed=SEED + 1)
    assert torch.equal(other.labels, together.labels)
    assert not torch.equal(other.t, together.t)
    assert not torch.equal(other.tokens, together.tokens)


@pytest.mark.parametrize("cfg", EVERY_CONFIG, ids=lambda c: f"{c.t_sampling}-{c.mask_sampling}-{c.attention_boundary}")
def test_contract(cfg):
    s, indices = 64, list(range(3, 35))
    batch = batch_of(indices, cfg, s)
    assert batch.tokens.dtype == batch.labels.dtype == batch.sample_index.dtype == torch.int64
    assert batch.loss_weight.dtype == batch.t.dtype == torch.float32
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.tokens.shape == batch.labels.shape == batch.loss_weight.shape == (32, s)
    assert np.array_equal(batch.labels.numpy(), [RandomText(s)[index] for index in indices])

    masked = batch.tokens == MASK
    assert torch.equal(masked, batch.loss_weight > 0), "a weight where nothing is masked, or a mask without weight"
    assert torch.equal(batch.tokens[~masked], batch.labels[~masked])
    segments = batch.cu_seqlens.diff()
    assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, 32 * s)
    assert (segments > 0).all()
    assert batch.max_seqlen == segments.max()
    assert set(range(0, 32 * s, s)) <= set(batch.cu_seqlens.tolist()), "a segment crosses two sequences"


@pytest.mark.parametrize("cfg", EVERY_CONFIG, ids=lambda c: f"{c.t_sampling}-{c.mask_sampling}-{c.attention_boundary}")
def test_segments_without_the_tokens_agree(cfg):
    """A middle pipeline stage draws the segments itself; if they differed, attention would differ across stages."""
    for indices in ([7], range(50), [9, 2, 2**33]):
        batch = batch_of(indices, cfg)
        cu_seqlens, max_seqlen = make_segments(indices, RandomText(64), cfg, SEED)
        assert torch.equal(cu_seqlens, batch.cu_seqlens)
        assert max_seqlen == batch.max_seqlen


def test_bernoulli_masks_with_probability_p_and_weight_one_over_p():
    cfg = config(attention_boundary="none", eps=0.01)
    batch = batch_of(range(400), cfg, s=500)
    p = np.array([mask_probability(sample_t(i, cfg, SEED), 0.01) for i in range(400)])
    counts = (batch.tokens == MASK).sum(1).numpy()
    z = (counts - 500 * p) / np.sqrt(500 * p * (1 - p) + 1e-9)
    assert abs(z.mean()) < 4 / np.sqrt(400)
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / 400)
    expected = np.where(batch.tokens.numpy() == MASK, 1 / p[:, None], 0)
    np.testing.assert_allclose(batch.loss_weight.numpy(), expected, rtol=1e-6)
    assert (batch.loss_weight <= 100 * (1 + 1e-6)).all(), "eps bounds the weight"


def test_bernoulli_masks_every_position_alike():
    hits = (batch_of(range(4000), config(attention_boundary="none"), s=32).tokens == MASK).double().mean(0)
    assert (hits - 0.5005).abs().max() < 4.5 * np.sqrt(0.25 / 4000)


def test_exact_count_masks_ceil_t_length():
    cfg = config(mask_sampling="exact_count", attention_boundary="none")
    s = 50
    batch = batch_of(range(300), cfg, s)
    k = [max(1, int(np.ceil(sample_t(i, cfg, SEED) * s))) for i in range(300)]
    assert (batch.tokens == MASK).sum(1).tolist() == k
    np.testing.assert_allclose(batch.loss_weight.sum(1).numpy(), np.full(300, s), rtol=1e-5)


def test_exact_count_chooses_sets_uniformly():
    """Among the samples with 2 of 5 masked, all ten pairs are equally frequent (chi-square, 9 degrees, p = 0.001)."""
    cfg = config(mask_sampling="exact_count", attention_boundary="none")
    masked = batch_of(range(20_000), cfg, s=5).tokens == MASK
    pairs = Counter(tuple(row.nonzero().flatten().tolist()) for row in masked[masked.sum(1) == 2])
    expected = sum(pairs.values()) / 10
    assert len(pairs) == 10
    assert sum((count - expected) ** 2 / expected for count in pairs.values()) < 27.9


def test_split_frequency_and_uniform_cuts():
    cfg, s, n = config(), 11, 30_000
    boundaries = [sample_boundary(i, RandomText(s), cfg, SEED) for i in range(n)]
    cuts = [b.segment_tokens[0] for b in boundaries if len(b.segment_tokens) == 2]
    assert all(sum(b.segment_tokens) == s and b.noised_tokens == s for b in boundaries)
    assert abs(len(cuts) / n - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
    counts = np.bincount(cuts, minlength=s + 1)[1:s]
    assert counts.sum() == len(cuts), "a cut outside 1..s-1"
    expected = len(cuts) / (s - 1)
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees, p = 0.001


def test_truncation():
    """Lengths uniform on 1..s; the tail is isolated, clean and without weight; the head counts as its own mean."""
    cfg, s = config(attention_boundary="truncate", truncate_probability=1.0, mask_sampling="exact_count"), 10
    boundaries = [sample_boundary(i, RandomText(s), cfg, SEED) for i in range(20_000)]
    counts = np.bincount([b.noised_tokens for b in boundaries], minlength=s + 1)[1:]
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
    batch = batch_of(range(2000), cfg, s)
    for row, boundary in enumerate(boundaries[:2000]):
        head = boundary.noised_tokens
        assert boundary.segment_tokens == ((s,) if head == s else (head, s - head))
        assert not batch.loss_weight[row, head:].any()
        assert (batch.tokens[row, :head] == MASK).any()
    # with exact_count the weights of each sequence sum to s whatever its length: none counts less for being short
    np.testing.assert_allclose(batch.loss_weight.sum(1).numpy(), np.full(2000, s), rtol=1e-5)


def test_truncated_bernoulli_weights_average_to_one_per_token():
    batch = batch_of(range(8000), config(attention_boundary="truncate", truncate_probability=0.5), s=16)
    means = batch.loss_weight.double().mean(1)
    assert abs(means.mean() - 1) < 4 * means.std() / np.sqrt(8000)


def test_truncation_frequency():
    cfg = config(attention_boundary="truncate", truncate_probability=0.2)
    shortened = np.mean([sample_boundary(i, RandomText(1000), cfg, SEED).noised_tokens < 1000 for i in range(20_000)])
    assert abs(shortened - 0.2 * 0.999) < 4 * np.sqrt(0.16 / 20_000)


def test_boundaries_masks_and_times_are_independent():
    """Drawn for different purposes: that a sequence is split must say nothing about its t or its masks."""
    cfg, n = config(t_sampling="uniform"), 20_000
    split = np.array([len(sample_boundary(i, RandomText(64), cfg, SEED).segment_tokens) for i in range(n)])
    t = np.array([sample_t(i, cfg, SEED) for i in range(n)])
    first_mask = np.array([words(SEED, "diffusion.mask", i, 1)[0] / 2**64 for i in range(n)])
    correlation = np.corrcoef([split, t, first_mask]) - np.eye(3)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


def test_one_token_sequences():
    for cfg in EVERY_CONFIG:
        batch = batch_of([0, 1], cfg, s=1)
        assert batch.cu_seqlens.tolist() == [0, 1, 2]


def test_moves_between_devices():
    batch = batch_of([1, 2], config())
    moved = moved_to(batch, "meta")
    for field in dataclasses.fields(batch):
        value = getattr(moved, field.name)
        assert value.device.type == "meta" if isinstance(value, torch.Tensor) else value == getattr(batch, field.name)


def test_clean_text_with_the_mask_token_is_refused():
    class Careless(RandomText):
        def __getitem__(self, sample_index):
            clean = super().__getitem__(sample_index)
            if sample_index == 8:
                clean[[3, 9]] = MASK
            return clean

    with pytest.raises(ValueError, match=r"sample 8 contains the mask token 5 at position 3 \(2 in all\)"):
        make_masked_batch(Careless(16), [7, 8], config(), MASK, SEED)


def test_documents_are_segments():
    """Tokens of another document must stay invisible, and no document of the sequence may be left out."""
    text, cfg = RandomText(64), config(attention_boundary="document")
    batch = batch_of(range(50), cfg)
    assert torch.equal(batch.loss_weight > 0, batch_of(range(50), config(attention_boundary="none")).loss_weight > 0)
    expected = [64 * row + start for row in range(50) for start in (0, *text.document_starts(row))]
    assert batch.cu_seqlens.tolist() == [*expected, 50 * 64]
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one sample index"):
        batch_of([], config())

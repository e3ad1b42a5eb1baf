"""The held-out bound's own noise: unbiased, spread over time and text, and nothing but the seed decides it."""

import math
from collections import Counter

import numpy as np
import pytest
from test_bound import MASK, SUMS, TEXT, L, exact_bound

from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter
from illada_megatron.diffusion.held_out import HeldOutSamples


def write_corpus(path, tokens, length, name="") -> Corpus:
    with IndexedDatasetWriter(path, 4000) as writer:
        writer.add(np.asarray(tokens, dtype=np.int64), [len(tokens)])
    return Corpus([path], length, 1, shuffle=False, vocab_size=4000, name=name)


@pytest.fixture
def counting(tmp_path) -> Corpus:
    """Windows of 16 tokens that are no masks; window w begins with 16 w + 6."""
    return write_corpus(tmp_path / "counting", range(6, 6 + 16 * 50), 16)


@pytest.mark.parametrize("num_samples", [1, 3, 8])
def test_unbiased_over_seeds(tmp_path, num_samples: int) -> None:
    """Also where a sample has several counts in its stratum, and where strata are finer than the counts."""
    corpus = write_corpus(tmp_path / "toy", TEXT, L)
    means = []
    for seed in range(6000 // num_samples):
        samples = HeldOutSamples([corpus], num_samples, seed, MASK)
        batch = samples.batch(range(num_samples))
        codes = ((batch.tokens == MASK).numpy() << np.arange(L)).sum(1)
        means.append((batch.loss_weight.numpy().max(1) * SUMS[codes] / L).mean())
    error = np.std(means, ddof=1) / math.sqrt(len(means))
    expected = exact_bound("exact_count", 0.0)
    assert abs(np.mean(means) - expected) < 4.5 * error
    assert error < 0.015 * expected, "too few draws to notice a wrong weight"


def test_weights_and_masks_agree(counting: Corpus) -> None:
    """K = ceil(t L) masks of weight L / K, one segment a window, the text behind them untouched."""
    samples = HeldOutSamples([counting], 40, 7, MASK)
    batch = samples.batch(range(40))
    masked = (batch.tokens == MASK).numpy()
    assert masked.sum(1).tolist() == [math.ceil(samples.t(index) * 16) for index in range(40)]
    assert np.allclose(batch.loss_weight.numpy().sum(1), 16)
    assert np.array_equal(batch.loss_weight.numpy() > 0, masked)
    assert np.array_equal(batch.tokens.numpy()[~masked], batch.labels.numpy()[~masked])
    assert batch.cu_seqlens.tolist() == list(range(0, 41 * 16, 16))
    assert batch.labels[:, 0].tolist() == [6 + 16 * samples.window(index)[1] for index in range(40)]


@pytest.mark.parametrize("num_samples", [1, 7, 20, 50, 64, 100])
def test_times_and_windows_are_spread(counting: Corpus, num_samples: int) -> None:
    """One time in every stratum, windows over the whole text, none twice before all came; of each seed others."""
    every, firsts = Counter(), set()
    for seed in range(150):
        samples = HeldOutSamples([counting], num_samples, seed, MASK)
        windows = [samples.window(index)[1] for index in range(num_samples)]
        times = [samples.t(index) for index in range(num_samples)]
        assert sorted(int(t * num_samples) for t in times) == list(range(num_samples))
        counts = Counter(windows)
        assert set(counts.values()) <= {num_samples // 50, -(-num_samples // 50)}
        assert windows == sorted(windows)
        steps = np.diff([*windows, windows[0] + 50])
        assert steps.max() - steps.min() <= 1
        every += counts
        firsts.add(times[0])
    assert len(firsts) == 150
    expected = 150 * num_samples / 50
    assert max(abs(every[window] - expected) for window in range(50)) < 5 * math.sqrt(expected)


def test_a_sample_is_a_pure_function(counting: Corpus, tmp_path) -> None:
    """Not of the batch it comes in; and another text beside it changes none of its draws."""
    alone = HeldOutSamples([counting], 12, 3, MASK)
    other = write_corpus(tmp_path / "other", range(1000, 1000 + 16 * 33), 16, name="other")
    both = HeldOutSamples([counting, other], 12, 3, MASK)
    whole = both.batch(range(24))
    for index in (5, 11, 3):
        for samples in (alone, both):
            one = samples.batch([index])
            assert np.array_equal(one.tokens[0], whole.tokens[index])
            assert one.t[0] == whole.t[index]
    assert int(whole.labels[12:].min()) >= 1000
    assert not np.array_equal(whole.t[:12], whole.t[12:])
    assert len(both) == 24


def test_a_window_with_the_mask_is_named(tmp_path) -> None:
    tokens = np.arange(6, 6 + 160)
    tokens[83] = MASK
    samples = HeldOutSamples([write_corpus(tmp_path / "bad", tokens, 16, name="web")], 10, 3, MASK)
    with pytest.raises(DataError, match=r"window 5 of the held-out text web contains the mask token 5 at position 3"):
        samples.batch(range(10))

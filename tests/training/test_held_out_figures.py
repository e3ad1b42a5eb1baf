"""Held-out figures against what is known of their samples: standard errors against the spread over many draws."""

import math

import numpy as np
import pytest

from illada_megatron.training.held_out_figures import (
    HeldOut,
    position_bins,
    standard_error,
    text_figures,
)


def _losses(generator: np.random.Generator, samples: int, sources: bool) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the shape of a language model's: they rise with t, differ between windows, and are noisy where few
    tokens are masked. Windows are spread evenly with a random start, t is stratified. sources: the text is sorted by
    sources that differ by nats, as a corpus may be."""
    place = (np.arange(samples) + generator.uniform()) / samples
    t = (generator.permutation(samples) + generator.uniform(size=samples)) / samples
    losses = 2 + 4 * t**1.5 + generator.normal(scale=0.7, size=samples)
    losses += generator.normal(size=samples) * np.minimum(3.0, 0.3 / np.sqrt(t + 1e-3))
    if sources:
        losses += np.array([0.0, 3.0, -1.0, 1.5])[(place * 4).astype(int)]
    return losses, t


@pytest.mark.parametrize("sources", [False, True])
@pytest.mark.parametrize("samples", [16, 64, 400])
def test_standard_error_is_the_spread_over_seeds(samples: int, sources: bool) -> None:
    """An error that forgot the stratification of t would be half as large again at 64 samples; one that took sources
    for noise, twice as large."""
    generator = np.random.default_rng(samples)
    means, errors = [], []
    for _ in range(1000):
        losses, t = _losses(generator, samples, sources)
        means.append(losses.mean())
        errors.append(standard_error(losses, t))
    spread = np.std(means, ddof=1)
    told = math.sqrt(np.mean(np.square(errors)))
    # between sixteen windows every third step is to another source
    assert 0.9 * spread < told < (1.75 if samples == 16 else 1.25) * spread


@pytest.mark.parametrize("each", [2, 8])
def test_more_samples_than_windows_are_no_more_text(each: int) -> None:
    """Their neighbours differ by masks alone: of 32 windows, eight samples each, 0.15 of the spread was told."""
    generator = np.random.default_rng(each)
    means, errors = [], []
    for _ in range(1000):
        windows = np.repeat(np.arange(32), each)
        n = len(windows)
        t = (generator.permutation(n) + generator.uniform(size=n)) / n
        losses = 2 + 4 * t + generator.normal(size=32)[windows] + generator.normal(scale=0.5, size=n)
        means.append(losses.mean())
        errors.append(standard_error(losses, t, windows))
    assert 0.9 < math.sqrt(np.mean(np.square(errors))) / np.std(means, ddof=1) < 1.25


def test_few_samples_tell_no_error() -> None:
    assert standard_error(np.array([2.0]), np.array([0.5])) is None
    two = standard_error(np.array([2.0, 4.0]), np.array([0.2, 0.7]))
    assert two == pytest.approx(1.0)  # as of two random draws: |a - b| / 2
    assert standard_error(np.array([2.0, 4.0]), np.array([0.2, 0.7]), np.array([3, 3])) is None


def test_figures_by_hand() -> None:
    """Four samples of eight tokens: parts of a window, bins of t, and bytes."""
    nats = np.arange(32, dtype=float).reshape(4, 8)  # a position a part
    t = np.array([0.05, 0.95, 0.51, 0.55])
    text = text_figures("web", 10, 8, t, nats, np.array([10.0, 20.0, 5.0, 5.0]))
    assert text.nats_per_token.value == pytest.approx(nats.sum() / 32)
    assert (text.num_samples, text.num_tokens, text.num_windows, text.num_bytes) == (4, 32, 10, 40)
    assert text.nats_per_byte.value == pytest.approx(nats.sum() / 40)
    assert text.bits_per_byte.value == pytest.approx(nats.sum() / 40 / math.log(2))
    by_t = {number: one.value for number, one in enumerate(text.by_t) if one is not None}
    assert by_t == {0: nats[0].mean(), 5: nats[2:].mean(), 9: nats[1].mean()}
    assert [one.value for one in text.by_position] == nats.mean(0).tolist()
    assert position_bins(20).tolist() == [0] * 3 + [1] * 2 + [2] * 3 + [3] * 2 + [4] * 3 + [5] * 2 + [6] * 3 + [7] * 2


def test_parts_of_a_window_average_to_the_bound() -> None:
    generator = np.random.default_rng(1)
    nats, t = generator.exponential(size=(32, 8)), generator.uniform(size=32)
    text = text_figures("", 40, 24, t, nats, None)
    assert np.mean([one.value for one in text.by_position]) == pytest.approx(text.nats_per_token.value)
    assert (text.num_bytes, text.nats_per_byte, text.bits_per_byte) == (None, None, None)


def test_the_mean_of_texts() -> None:
    """Plain, whatever their sizes; no figure per byte where one's is not known."""
    generator = np.random.default_rng(2)
    t = (generator.permutation(64) + 0.5) / 64
    texts = [
        text_figures(name, 100, 16, t, generator.exponential(scale, size=(64, 8)), sizes)
        for name, scale, sizes in (("web", 1.0, np.full(64, 70.0)), ("code", 3.0, np.full(64, 30.0)))
    ]
    mean = HeldOut(texts, None).mean
    web, code = texts
    assert mean.nats_per_token.value == (web.nats_per_token.value + code.nats_per_token.value) / 2
    assert mean.nats_per_token.standard_error == pytest.approx(
        math.hypot(web.nats_per_token.standard_error, code.nats_per_token.standard_error) / 2
    )
    assert mean.nats_per_byte.value == pytest.approx((web.nats_per_byte.value + code.nats_per_byte.value) / 2)
    assert mean.num_bytes == 6400
    unknown = text_figures("code", 100, 16, t, generator.exponential(size=(64, 8)), None)
    assert HeldOut([web, unknown], "no tokenizer").mean.nats_per_byte is None
    assert HeldOut([web], None).mean is web

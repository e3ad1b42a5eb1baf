"""The training loss is an unbiased estimate of the likelihood bound, and what the t samplers do to its variance.

The toy is small enough that the bound is known exactly (toy.py). `pytest -s` prints the variance ratios.
"""

import itertools
import math

import numpy as np
import pytest
from toy import JOINT, MASK, SEED, SIZES, SUMS, TEXT, VOCAB, L, OneText, cross_entropy_sums, draw_losses, exact_bound

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion import make_masked_batch, sample_t

T_SAMPLINGS = ("uniform", "stratified", "antithetic")
MASK_SAMPLINGS = ("bernoulli", "exact_count")
GROUP = 8  # consecutive samples: blocks of it are independent for every sampler


def noise(t_sampling: str, mask_sampling: str, **fields) -> DiffusionConfig:
    return DiffusionConfig(
        t_sampling=t_sampling, mask_sampling=mask_sampling, attention_boundary="none", t_group_size=GROUP, **fields
    )


@pytest.fixture(scope="module")
def draws() -> dict[tuple[str, str], np.ndarray]:
    return {
        (t, mask): draw_losses(noise(t, mask), 40_000) for t, mask in itertools.product(T_SAMPLINGS, MASK_SAMPLINGS)
    }


def test_the_bound_of_an_exact_model_is_its_likelihood():
    """With the joint's own conditionals the eps = 0 bound is tight: it checks enumeration, weights and formulas at once
    (arXiv 2502.09992 section 2: any-order factorisation)."""
    nll = -math.log(JOINT[tuple(TEXT)]) / L
    assert exact_bound("exact_count", 0.0) == pytest.approx(nll, rel=1e-12)
    assert exact_bound("bernoulli", 0.0) == pytest.approx(nll, rel=1e-12)
    assert exact_bound("bernoulli", 1e-3) != pytest.approx(nll, rel=1e-6)


@pytest.mark.parametrize("mask_sampling", MASK_SAMPLINGS)
@pytest.mark.parametrize("t_sampling", T_SAMPLINGS)
def test_loss_is_unbiased(draws, t_sampling, mask_sampling):
    losses = draws[t_sampling, mask_sampling]
    means = losses.reshape(-1, GROUP).mean(1)
    error = means.std(ddof=1) / math.sqrt(len(means))
    expected = exact_bound(mask_sampling, 1e-3)
    print(f"\n{t_sampling} {mask_sampling}: {means.mean():.4f}, exactly {expected:.4f}, standard error {error:.4f}")
    assert abs(means.mean() - expected) < 4.5 * error
    assert error < 0.02 * expected, "too few draws to notice a wrong weight"


@pytest.mark.parametrize("mask_sampling", MASK_SAMPLINGS)
def test_a_large_eps_moves_only_the_bernoulli_expectation(mask_sampling):
    """eps = 0.3 makes its effect visible: exact_count must not use it."""
    losses = draw_losses(noise("stratified", mask_sampling, eps=0.3), 20_000)
    means = losses.reshape(-1, GROUP).mean(1)
    error = means.std(ddof=1) / math.sqrt(len(means))
    with_eps, without = exact_bound("bernoulli", 0.3), exact_bound("exact_count", 0.0)
    assert abs(with_eps - without) > 10 * error
    assert abs(means.mean() - (with_eps if mask_sampling == "bernoulli" else without)) < 4.5 * error


@pytest.mark.parametrize("t_sampling", T_SAMPLINGS)
def test_t_is_marginally_uniform(t_sampling):
    """Over all samples, and at each place within a group of eight (Kolmogorov-Smirnov, p = 0.001)."""
    t = np.array([sample_t(i, noise(t_sampling, "bernoulli"), SEED) for i in range(32_000)])
    for values in (t, *t.reshape(-1, GROUP).T):
        steps = np.arange(1, values.size + 1) / values.size
        assert np.abs(np.sort(values) - steps).max() * math.sqrt(values.size) < 1.95


def test_stratified_groups_cover_every_stratum_once():
    for size in (1, 3, 8):
        config = DiffusionConfig(t_sampling="stratified", t_group_size=size)
        t = np.array([sample_t(i, config, SEED) for i in range(size * 50)]).reshape(50, size)
        assert np.array_equal(np.sort((t * size).astype(int), axis=1), np.tile(np.arange(size), (50, 1)))
        if size > 1:
            assert len({tuple(row) for row in (t * size).astype(int)}) > 1, "the same permutation in every group"


def test_antithetic_pairs_mirror():
    t = np.array([sample_t(i, noise("antithetic", "bernoulli"), SEED) for i in range(1000)])
    assert np.array_equal(t[1::2], 1 - t[::2])


# --- variance ---------------------------------------------------------------------------------------------------------


def variance_of_means(losses: np.ndarray) -> float:
    """Variance of the mean loss of GROUP consecutive samples."""
    return float(losses.reshape(-1, GROUP).mean(1).var(ddof=1))


def exact_ratio(t_sampling: str, mask_sampling: str, sums: np.ndarray = SUMS, eps: float = 1e-3) -> float:
    """Variance of a group's mean over uniform sampling's, by quadrature over t. With m(t) = E[loss | t]:

    stratified  1 - Var(mean of m over the strata) / Var(loss);     antithetic  1 + Cov(m(t), m(1-t)) / Var(loss).
    """
    t = (np.arange(48_000) + 0.5) / 48_000
    if mask_sampling == "bernoulli":
        p = ((1 - eps) * t + eps)[:, None]
        chance, weight = p**SIZES * (1 - p) ** (L - SIZES), 1 / p
    else:
        k = np.ceil(t * L)[:, None]
        chance, weight = (k == SIZES) / np.vectorize(math.comb)(L, SIZES), L / k
    mean = (chance * sums * weight).sum(1) / L
    variance = ((chance * sums**2 * weight**2).sum(1) / L**2).mean() - mean.mean() ** 2
    if t_sampling == "stratified":
        return 1 - mean.reshape(GROUP, -1).mean(1).var() / variance
    return 1 + ((mean - mean.mean()) * (mean[::-1] - mean.mean())).mean() / variance


@pytest.mark.parametrize("mask_sampling", MASK_SAMPLINGS)
@pytest.mark.parametrize("t_sampling", ["stratified", "antithetic"])
def test_variance_of_six_tokens(draws, t_sampling, mask_sampling):
    """At six tokens the masks' own noise dominates; the samplers remove what t contributes, no more and no less."""
    measured = variance_of_means(draws[t_sampling, mask_sampling]) / variance_of_means(draws["uniform", mask_sampling])
    expected = exact_ratio(t_sampling, mask_sampling)
    print(f"\nL=6: variance of {t_sampling} / uniform, {mask_sampling}: {measured:.3f} measured, {expected:.3f} exact")
    # each variance is taken from 5000 heavy-tailed means (standard error 3 to 4 %), so the ratio's is about 5 %
    assert measured == pytest.approx(expected, rel=0.15)
    assert expected < 0.75


def test_neither_sampler_helps_where_t_hardly_matters():
    """A text with a surprise: some of its tokens cost less when more is masked, and E[loss | t] is nearly flat."""
    surprising = TEXT.copy()
    surprising[2] = (surprising[2] + 1) % VOCAB
    sums = cross_entropy_sums(JOINT, surprising)
    for t_sampling in ("stratified", "antithetic"):
        ratio = exact_ratio(t_sampling, "exact_count", sums)
        print(f"\nL=6, a surprising text: variance of {t_sampling} / uniform, exact_count: {ratio:.3f} exact")
        assert 0.95 < ratio < 1


def long_losses(t_sampling: str, mask_sampling: str, samples: int, length: int = 1024) -> np.ndarray:
    """Losses of a sequence long enough for real training's proportions: a masked token costs between easy_i (nothing
    else masked) and hard_i (everything masked), as a language model's does: slowly at first, here with the square of
    the masked fraction."""
    rng = np.random.default_rng(1)
    easy, hard = rng.exponential(1.0, length), rng.exponential(7.0, length)
    corpus, losses = OneText(np.arange(6, 6 + length)), []
    for start in range(0, samples, 100):
        batch = make_masked_batch(corpus, range(start, start + 100), noise(t_sampling, mask_sampling), MASK, SEED)
        masked = (batch.tokens == MASK).numpy()
        cross_entropy = easy + (hard - easy) * masked.mean(1, keepdims=True) ** 2
        losses.append((batch.loss_weight.numpy() * cross_entropy).mean(1))
    return np.concatenate(losses)


def test_variance_of_a_long_sequence():
    """At 1024 tokens nearly all variance is that of t: this is where stratifying pays."""
    variance = {
        (t, mask): variance_of_means(long_losses(t, mask, 4000)) for t in T_SAMPLINGS for mask in MASK_SAMPLINGS
    }
    base = variance["uniform", "bernoulli"]
    for (t_sampling, mask_sampling), value in variance.items():
        print(f"\nL=1024: variance of {t_sampling} {mask_sampling} / uniform bernoulli: {value / base:.4f}", end="")
    for mask in MASK_SAMPLINGS:
        assert variance["stratified", mask] < variance["antithetic", mask] < variance["uniform", mask]
    assert variance["stratified", "bernoulli"] < 0.15 * base

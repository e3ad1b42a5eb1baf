"""The diffusion time t of each sample, or of each of its segments, and how much of the text is masked at it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion.noise import uniforms


class NoiseSchedule(NamedTuple):
    """m(t), the share of tokens that are masked at time t, rising from m(0) = 0 to m(1) = 1.

    Any such m gives the same bound: that of a text is the integral over p of E[sum of CE] / p, and p = m(t) with
    t uniform has the density 1 / m'(t), which the weight m'(t) / p undoes (arXiv 2406.04329: -alpha' / (1 - alpha)).
    """

    share: Callable[[float], float]
    slope: Callable[[float], float]
    """m'(t)."""


def _cosine(t: float) -> float:
    return math.cos(0.5 * math.pi * (1.0 - t))


def _cosine_slope(t: float) -> float:
    return 0.5 * math.pi * math.sin(0.5 * math.pi * (1.0 - t))


SCHEDULES: dict[str, NoiseSchedule] = {
    # arXiv 2502.09992, equation 3
    "linear": NoiseSchedule(lambda t: t, lambda _: 1.0),
    # MaskGIT's mask ratio cos(pi/2 r) at r = 1 - t (arXiv 2202.04200, section 3.3); MD4's alpha = 1 - cos(pi/2 (1 - t))
    "cosine": NoiseSchedule(_cosine, _cosine_slope),
}
"""By `config.noise_schedule`."""


def mask_probability(t: float, eps: float, schedule: str = "linear") -> float:
    """p = (1 - eps) m(t) + eps: at least eps, so that the weight 1/p stays bounded (as in LLaDA's code)."""
    return (1.0 - eps) * SCHEDULES[schedule].share(t) + eps


def pair_of(sample_index: int, config: DiffusionConfig) -> tuple[int, bool]:
    """(what the sample's noise is drawn for, whether it is the complement of the other one drawn for it)."""
    if not config.complementary_masks:
        return sample_index, False
    pair, second = divmod(sample_index, 2)
    return pair, bool(second)


def sample_t(sample_index: int, config: DiffusionConfig, seed: int) -> float:
    """Diffusion time of a sample (of its first segment, where each has its own)."""
    return sample_times(sample_index, 1, config, seed)[0]


def sample_times(sample_index: int, count: int, config: DiffusionConfig, seed: int) -> list[float]:
    """Times of a sample's first `count` segments, each uniform on [t_min, t_max) taken alone and independent of the
    others of its sample.

    `config.t_sampling` says how the times of neighbouring samples depend on each other, which lowers the variance of
    their mean loss and never changes its expectation:

    - uniform: they do not;
    - stratified: u = (pi_g(j) + v) / G for sample j of group g, G = `config.t_group_size` consecutive sample indices;
      pi_g is a random permutation, so each group has exactly one u in every [k/G, (k+1)/G), and so have its second
      segments, and so on;
    - antithetic: samples 2k and 2k+1 have u and 1 - u.

    t = t_min + (t_max - t_min) u. With `config.complementary_masks` all this is of pairs of samples, which have t and
    1 - t.
    """
    index, complement = pair_of(sample_index, config)
    span = config.t_max - config.t_min
    times = [config.t_min + span * float(u) for u in _units(index, count, config, seed)]
    return [1.0 - t for t in times] if complement else times


def _units(index: int, count: int, config: DiffusionConfig, seed: int) -> NDArray[np.float64]:
    """`[count]` uniforms in [0, 1)."""
    if config.t_sampling == "uniform":
        return uniforms(seed, "diffusion.t", index, count)
    if config.t_sampling == "antithetic":
        pair, mirrored = divmod(index, 2)
        drawn = uniforms(seed, "diffusion.t", pair, count)
        return 1.0 - drawn if mirrored else drawn
    size = config.t_group_size
    group, place = divmod(index, size)
    strata = np.argsort(uniforms(seed, "diffusion.t_strata", group, size * count).reshape(count, size))[:, place]
    return (strata + uniforms(seed, "diffusion.t", index, count)) / size

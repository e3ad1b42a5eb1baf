"""What a masked token's cross-entropy counts in the loss."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion.schedule import mask_probability

LossWeight = Callable[[float, float, DiffusionConfig], float]
"""(m'(t) / p, p, config) -> the weight, above 0. p: the share of the tokens that are masked; the first is the weight
that makes the loss a bound of the negative log-likelihood."""


def bound(bound_weight: float, p: float, config: DiffusionConfig) -> float:  # noqa: ARG001
    """1/p for the linear schedule (arXiv 2502.09992, equation 3)."""
    return bound_weight


def clipped(bound_weight: float, p: float, config: DiffusionConfig) -> float:  # noqa: ARG001
    """As the bound's, where few tokens are masked no more than a cap: less variance, less of what is nearly clean."""
    return min(bound_weight, config.max_loss_weight)


def unweighted(bound_weight: float, p: float, config: DiffusionConfig) -> float:  # noqa: ARG001
    """1 / (mean p), the same for every masked token: the weights of all tokens then have the mean 1, as the bound's,
    and the loss is the mean cross-entropy of a masked token, with the expected number of them for the drawn one (which
    would make a sample's loss depend on the others of its batch)."""
    return 1.0 / _mean_probability(config)


LOSS_WEIGHTS: dict[str, LossWeight] = {
    "bound": bound,
    "clipped": clipped,
    "unweighted": unweighted,
}
"""By `config.loss_weight`."""


@lru_cache(maxsize=64)
def _mean_probability(config: DiffusionConfig) -> float:
    """Mean of p over t, by the midpoint rule: exact for a linear schedule, to 1e-7 for a smooth one."""
    eps = config.eps if config.mask_sampling == "bernoulli" else 0.0
    times = config.t_min + (config.t_max - config.t_min) * (np.arange(1000) + 0.5) / 1000
    return float(np.mean([mask_probability(float(t), eps, config.noise_schedule) for t in times]))

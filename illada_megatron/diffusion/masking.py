"""Which tokens of a sample are masked, and the weight of their cross-entropy."""

import math

import numpy as np
from numpy.typing import NDArray

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion.noise import uniforms, words
from illada_megatron.diffusion.schedule import mask_probability

_PURPOSE = "diffusion.mask"


def sample_mask(
    sample_index: int, length: int, t: float, config: DiffusionConfig, seed: int
) -> tuple[NDArray[np.bool_] | NDArray[np.int64], float]:
    """Masked positions of a sample's first `length` tokens and their weight.

    Returns:
        What indexes the masked positions (a mask `[length]` or their numbers `[k]`), and the weight that makes
        `weight * sum of CE over them / length` an unbiased estimate of the bound:

        - bernoulli: each position with probability p(t), weight 1/p (arXiv 2502.09992, equation 3);
        - exact_count: k = max(1, ceil(t * length)) positions, uniformly chosen, weight length/k (the same paper's
          equation 6). k >= 1 keeps the weight bounded, so eps has no part in it and the expectation is the bound
          at eps = 0.
    """
    if config.mask_sampling == "bernoulli":
        p = mask_probability(t, config.eps)
        return uniforms(seed, _PURPOSE, sample_index, length) < p, 1.0 / p
    k = min(max(1, math.ceil(t * length)), length)
    # the places of the k smallest of i.i.d. words are a uniformly chosen set of k positions
    chosen = np.argpartition(words(seed, _PURPOSE, sample_index, length), k - 1)[:k]
    return chosen, length / k

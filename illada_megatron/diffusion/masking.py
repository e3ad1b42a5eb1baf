"""Which tokens of a sample are masked, and what their cross-entropy has to be multiplied with."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion.noise import uniforms, words
from illada_megatron.diffusion.schedule import SCHEDULES, mask_probability, pair_of

_PURPOSE = "diffusion.mask"


class SpanMask(NamedTuple):
    """The masks of neighbouring tokens that share one t."""

    tokens: slice
    positions: NDArray[np.bool_] | NDArray[np.int64]
    """What indexes the masked ones among them: a mask `[length]` or their numbers `[k]`."""
    p: float
    """bernoulli: the probability of each to be masked; exact_count: the share that is."""
    bound_weight: float
    """m'(t) / p."""


def sample_masks(
    sample_index: int, lengths: Sequence[int], times: Sequence[float], config: DiffusionConfig, seed: int
) -> Iterator[SpanMask]:
    """The masks of a sample's spans, `lengths` tokens one after the other, each at its time.

    For each of them `bound_weight * sum of CE over the masked / length` is an unbiased estimate of the bound:

    - bernoulli: each position with probability p(t) (arXiv 2502.09992, equation 3);
    - exact_count: k = max(1, ceil(m(t) * length)) positions, uniformly chosen, p = k / length (the same paper's
      equation 6). k >= 1 keeps the weight bounded, so eps has no part in it and the expectation is the bound
      at eps = 0.

    Of a complementary pair the one masks where what is drawn is smallest, the other where it is largest. Together they
    mask every position: p(t) + p(1 - t) = 1 + eps, and two counts add up to length or length + 1.
    """
    index, complement = pair_of(sample_index, config)
    slope = SCHEDULES[config.noise_schedule].slope
    bernoulli = config.mask_sampling == "bernoulli"
    drawn = (uniforms if bernoulli else words)(seed, _PURPOSE, index, sum(lengths))
    start = 0
    for length, t in zip(lengths, times, strict=True):
        tokens = slice(start, start + length)
        start += length
        of_span = drawn[tokens]
        if bernoulli:
            p = mask_probability(t, config.eps, config.noise_schedule)
            positions = of_span >= 1.0 - p if complement else of_span < p
            yield SpanMask(tokens, positions, p, slope(t) * (1.0 / p))
            continue
        k = min(max(1, math.ceil(SCHEDULES[config.noise_schedule].share(t) * length)), length)
        # the places of the k smallest (or largest) of i.i.d. words are a uniformly chosen set of k positions
        order = np.argpartition(of_span, length - k if complement else k - 1)
        chosen = order[length - k :] if complement else order[:k]
        yield SpanMask(tokens, chosen, k / length, slope(t) * (length / k))

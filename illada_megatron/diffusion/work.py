"""How much work samples are, known on every rank without reading a token: what a step's samples are divided by."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion.noise import uniforms_of_many
from illada_megatron.diffusion.schedule import SCHEDULES, mask_probability


class SampleWork(NamedTuple):
    """Of each sample, `[n]` float64."""

    masked_tokens: NDArray[np.float64]
    """exact_count: as many as there are. bernoulli: as many as are expected, from which what is drawn differs by 45 of
    8,192 (a standard deviation, at most)."""
    squared_lengths: NDArray[np.float64]
    """Sum over its segments of length^2."""


def work_of_samples(first_sample: int, num_samples: int, length: int, config: DiffusionConfig, seed: int) -> SampleWork:
    """Work of samples [first_sample, first_sample + num_samples) of `length` tokens, from the same draws as
    `sample_boundary`, `sample_times` and `sample_masks`.

    Where documents are the segments, their lengths are in the corpus's index, which would be looked at for each sample:
    all count as one segment, and as masked alike where each segment has a t of its own.
    """
    samples = np.arange(first_sample, first_sample + num_samples)
    drawn_for, complement = np.divmod(samples, 2) if config.complementary_masks else (samples, np.zeros_like(samples))
    first, noised = _boundaries(drawn_for, length, config, seed)
    squared = (first**2 + (length - first) ** 2).astype(np.float64)
    if config.t_per == "segment" and config.attention_boundary == "document":
        return SampleWork(np.ones(num_samples), squared)
    own_times = config.t_per == "segment" and config.attention_boundary == "split"
    times = _times(drawn_for, 2 if own_times else 1, config, seed)
    times = np.where(complement[:, None] == 1, 1.0 - times, times)
    if not own_times:
        return SampleWork(_masked(noised, times[:, 0], config), squared)
    rest = length - first
    in_rest = np.where(rest > 0, _masked(np.maximum(rest, 1), times[:, 1], config), 0.0)
    return SampleWork(_masked(first, times[:, 0], config) + in_rest, squared)


def _boundaries(
    samples: NDArray[np.int64], length: int, config: DiffusionConfig, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(length of the first segment, noised tokens) of each: `sample_boundary` without documents."""
    whole = np.full(len(samples), length)
    if config.attention_boundary in ("none", "document"):
        return whole, whole
    happens, where = uniforms_of_many(seed, "diffusion.boundary", samples, 2).T
    if config.attention_boundary == "split":
        cut = 1 + (where * (length - 1)).astype(np.int64)
        return np.where((happens < config.split_probability) & (length >= 2), cut, whole), whole
    head = np.where(happens < config.truncate_probability, 1 + (where * length).astype(np.int64), whole)
    return head, head


def _times(samples: NDArray[np.int64], count: int, config: DiffusionConfig, seed: int) -> NDArray[np.float64]:
    """`[n, count]`: `sample_times`, of what pairs share where they do."""
    if config.t_sampling == "uniform":
        units = uniforms_of_many(seed, "diffusion.t", samples, count)
    elif config.t_sampling == "antithetic":
        pair, mirrored = np.divmod(samples, 2)
        drawn = uniforms_of_many(seed, "diffusion.t", pair, count)
        units = np.where(mirrored[:, None] == 1, 1.0 - drawn, drawn)
    else:
        size = config.t_group_size
        groups, group_of = np.unique(samples // size, return_inverse=True)
        keys = uniforms_of_many(seed, "diffusion.t_strata", groups, size * count).reshape(len(groups), count, size)
        strata = np.argsort(keys, axis=-1)[group_of, :, samples % size]
        units = (strata + uniforms_of_many(seed, "diffusion.t", samples, count)) / size
    return config.t_min + (config.t_max - config.t_min) * units


def _masked(tokens: NDArray[np.int64], times: NDArray[np.float64], config: DiffusionConfig) -> NDArray[np.float64]:
    """Of each run of `tokens` at its time. One by one: a vectorised cosine may differ from one machine to the next in
    its last bit, and all ranks have to divide a step alike."""
    pairs = zip(tokens.tolist(), times.tolist(), strict=True)
    if config.mask_sampling == "bernoulli":
        masked = [n * mask_probability(t, config.eps, config.noise_schedule) for n, t in pairs]
    else:
        share = SCHEDULES[config.noise_schedule].share
        masked = [float(min(max(1, math.ceil(share(t) * n)), n)) for n, t in pairs]
    return np.array(masked)

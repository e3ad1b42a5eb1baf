"""How much of a sample is worked on, on average over what is drawn for it: what a pipeline is balanced and a run is
planned by. Of the samples of a step, `diffusion/work.py` knows it one by one."""

import math

from illada_megatron.config.schema import DiffusionConfig


def mean_attended(diffusion: DiffusionConfig, length: int) -> float:
    """Mean over the tokens of a sequence of the length of their segment: E[x^2 + (1 - x)^2] = 2/3 of the sequence where
    it is cut, or shortened, at a uniform x. Where documents end is not known here: such sequences count as whole."""
    cut = {"split": diffusion.split_probability, "truncate": diffusion.truncate_probability}
    return length * (1 - cut.get(diffusion.attention_boundary, 0.0) / 3)


def mean_masked(diffusion: DiffusionConfig) -> float:
    """Mean share of a sequence's tokens that are masked, t uniform in [t_min, t_max): m(t) = t or cos(pi / 2 (1 - t)),
    eps added where masks are Bernoulli; of a shortened sequence, half is never masked."""
    low, high = diffusion.t_min, diffusion.t_max
    if diffusion.noise_schedule == "linear":
        share = (low + high) / 2
    else:
        share = 2 / math.pi * (math.sin(math.pi / 2 * (1 - low)) - math.sin(math.pi / 2 * (1 - high))) / (high - low)
    if diffusion.mask_sampling == "bernoulli":
        share = (1 - diffusion.eps) * share + diffusion.eps
    if diffusion.attention_boundary == "truncate":
        share *= 1 - diffusion.truncate_probability / 2
    return share

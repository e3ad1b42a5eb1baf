"""The diffusion time t of each sample and the probability with which its tokens are masked."""

import numpy as np

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion.noise import uniforms


def sample_t(sample_index: int, config: DiffusionConfig, seed: int) -> float:
    """Diffusion time of a sample, uniform on [0, 1) for each sample taken alone.

    `config.t_sampling` says how the times of neighbouring samples depend on each other, which lowers the variance of
    their mean loss and never changes its expectation:

    - uniform: they do not;
    - stratified: t = (pi_g(j) + u) / G for sample j of group g, G = `config.t_group_size` consecutive sample indices;
      pi_g is a random permutation, so each group has exactly one t in every [k/G, (k+1)/G);
    - antithetic: samples 2k and 2k+1 have t = u and 1 - u.
    """
    if config.t_sampling == "uniform":
        return float(uniforms(seed, "diffusion.t", sample_index, 1)[0])
    if config.t_sampling == "antithetic":
        pair, mirrored = divmod(sample_index, 2)
        u = float(uniforms(seed, "diffusion.t", pair, 1)[0])
        return 1.0 - u if mirrored else u
    size = config.t_group_size
    group, place = divmod(sample_index, size)
    strata = np.argsort(uniforms(seed, "diffusion.t_strata", group, size))
    u = float(uniforms(seed, "diffusion.t", sample_index, 1)[0])
    return (int(strata[place]) + u) / size


def mask_probability(t: float, eps: float) -> float:
    """p = (1 - eps) t + eps: at least eps, so that the weight 1/p stays bounded (as in LLaDA's code)."""
    return (1.0 - eps) * t + eps

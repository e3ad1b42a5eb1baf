"""Frequencies of the rotary embedding (arXiv 2104.09864), scaled for longer sequences where the model says so.

The formulas are those of Hugging Face's transformers (`modeling_rope_utils.py`, 5.24), in its order of operations in
fp32: a model that is exported is the same to the last bit of its frequencies. Both layer implementations take them from
megatron-core's RotaryEmbedding, which turns them into angles.
"""

import math

import torch
from torch import Tensor

from illada_megatron.config import ModelConfig
from illada_megatron.config.schema import RopeScaling


def scaled_frequencies(model: ModelConfig, scaling: RopeScaling) -> Tensor:
    """[d / 2] fp32: by how much each pair of a head's elements is turned from a position to the next."""
    dim, base = model.head_dim, model.rotary_base
    powers = base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if scaling.rope_type == "linear":
        return 1.0 / powers / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(1.0 / powers, scaling)
    return _yarn(powers, dim, base, scaling)


def attention_scale(model: ModelConfig) -> float | None:
    """Factor of the scores q . k; None: 1 / sqrt(d).

    yarn multiplies queries and keys by its attention_factor, which multiplies their products by its square: here that
    is part of the scale, for no kernel of rotary embeddings takes it.
    """
    scaling = model.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return None
    return attention_factor(scaling) ** 2 / math.sqrt(model.head_dim)


def attention_factor(scaling: RopeScaling) -> float:
    """yarn's (arXiv 2309.00071, eq. 22: its sqrt(1 / t))."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """`_compute_llama3_parameters`."""
    length, low, high = _given(
        scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    )
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / scaling.factor, frequencies)
    smooth = (length / wavelengths - low) / (high - low)
    between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_between = ~(wavelengths < length / high) * ~(wavelengths > length / low)
    return torch.where(is_between, between, scaled)


def _yarn(powers: Tensor, dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """`_compute_yarn_parameters`: a ramp over the pairs, from those that stay to those that are stretched."""
    (length,) = _given(scaling.original_max_position_embeddings)

    def pair_that_turns(turns: float) -> float:
        return (dim * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast or 32.0)), 0)
    high: float = min(math.ceil(pair_that_turns(scaling.beta_slow or 1.0)), dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    stays = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - stays) + 1.0 / powers * stays


def _given(*values: float | None) -> list[float]:
    """That they are there is RopeScaling's to check."""
    return [value for value in values if value is not None]

"""Initial weights for a measurement, drawn where the model is. The package draws them row by row on a CPU, so that
every layout has the same; for billions of them that takes longer than the steps."""

import zlib
from collections.abc import Sequence

import torch

from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import canonical_name
from illada_megatron.model import MaskPredictor


@torch.no_grad()
def fill_on_device(chunks: Sequence[MaskPredictor], model: ModelConfig, seed: int) -> None:
    """As `fill_initial_weights`, with one standard deviation for all matrices: functions of (seed, canonical name), so
    that a peer's model with the same names begins with the same."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            full_name = canonical_name(name, chunk.layer_offset, model.tie_word_embeddings)
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed}/{full_name}".encode()))
            parameter.normal_(std=model.init_method_std, generator=generator)

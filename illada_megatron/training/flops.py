"""Floating-point operations of a training step: matrix products only, forward and backward, no recomputation."""

from illada_megatron.config import ModelConfig
from illada_megatron.config.pipeline_split import part_flops


def training_flops(model: ModelConfig, tokens: int, sum_squared_lengths: int, masked_tokens: int) -> float:
    """FLOPs of a forward and a backward pass: of all layers (`part_flops`), and of the head, where only masked tokens
    meet the vocabulary (not its padding)."""
    layer, head = part_flops(model, tokens, sum_squared_lengths, masked_tokens)
    return model.num_layers * layer + head

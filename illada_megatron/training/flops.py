"""Floating-point operations of a training step: matrix products only, forward and backward, no recomputation."""

from illada_megatron.config import ModelConfig


def training_flops(model: ModelConfig, tokens: int, sum_squared_lengths: int, masked_tokens: int) -> float:
    """FLOPs of a forward and a backward pass.

    A product of [m, k] and [k, n] counts 2mkn; the backward pass takes twice the forward's. Layers: every token
    through every linear weight. Attention: q k^T and a v over all pairs of a segment's positions (bidirectional, so
    sum of length^2 over segments, twice a causal table's). Head: only masked tokens meet the vocabulary (not its
    padding). Derived in docs/training.md.
    """
    hidden, dim = model.hidden_size, model.head_dim
    attention_weights = hidden * dim * 2 * (model.num_attention_heads + model.num_query_groups)
    layer = 2 * tokens * (attention_weights + 3 * hidden * model.ffn_hidden_size)
    pairs = 4 * sum_squared_lengths * model.num_attention_heads * dim
    head = 2 * masked_tokens * hidden * model.vocab_size
    return 3.0 * (model.num_layers * (layer + pairs) + head)

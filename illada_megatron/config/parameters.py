"""Every parameter of the model by its canonical name, with its whole shape and how tensor parallel divides it.

Checkpoints, initial weights and conversions speak of parameters in these names, whatever layout or layer
implementation holds them.
"""

import re
from dataclasses import dataclass
from typing import Literal

from illada_megatron.config.schema import ModelConfig

Split = Literal["rows", "columns", "gated rows"]

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Transformer Engine keeps a norm's weight in the linear layer that it is fused with.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    """With the padded vocabulary."""
    split: Split | None
    """How tensor-parallel ranks divide it; gated rows: each holds its part of the first half (SwiGLU's gate), then of
    the second (the up projection). None: each holds all of it."""

    def held(self, rank: int, size: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """What tensor-parallel rank `rank` of `size` holds: runs of rows of its own tensor, as (first row there,
        shape, offset in the whole tensor)."""
        if self.split is None:
            return [(0, self.shape, (0,) * len(self.shape))]
        rows, *rest = self.shape
        if self.split == "columns":
            width = self.shape[1] // size
            return [(0, (rows, width), (0, rank * width))]
        parts = 2 if self.split == "gated rows" else 1
        count, zeros = rows // parts // size, (0,) * len(rest)
        return [
            (part * count, (count, *rest), (part * (rows // parts) + rank * count, *zeros)) for part in range(parts)
        ]

    def held_shape(self, size: int) -> tuple[int, ...]:
        """Shape of a tensor-parallel rank's tensor."""
        if self.split is None:
            return self.shape
        axis = 1 if self.split == "columns" else 0
        return tuple(length // size if index == axis else length for index, length in enumerate(self.shape))


def parameters(model: ModelConfig) -> list[Parameter]:
    """All parameters, in the order embedding, layers, final norm, head (untied only)."""
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, model.head_dim
    queries, groups = model.num_attention_heads, model.num_query_groups
    vocabulary = (model.padded_vocab_size, hidden)
    qkv = (queries + 2 * groups) * head
    bias: list[tuple[str, tuple[int, ...], Split | None]] = [("self_attention.linear_qkv.bias", (qkv,), "rows")]
    qk_norms: list[tuple[str, tuple[int, ...], Split | None]] = [
        ("self_attention.q_layernorm.weight", (head,), None),
        ("self_attention.k_layernorm.weight", (head,), None),
    ]
    layer: list[tuple[str, tuple[int, ...], Split | None]] = [
        ("input_layernorm.weight", (hidden,), None),
        ("self_attention.linear_qkv.weight", (qkv, hidden), "rows"),
        *(bias if model.add_qkv_bias else []),
        *(qk_norms if model.qk_layernorm else []),
        ("self_attention.linear_proj.weight", (hidden, queries * head), "columns"),
        ("pre_mlp_layernorm.weight", (hidden,), None),
        ("mlp.linear_fc1.weight", (2 * ffn, hidden), "gated rows"),
        ("mlp.linear_fc2.weight", (hidden, ffn), "columns"),
    ]
    found = [Parameter(EMBEDDING, vocabulary, "rows")]
    for index in range(model.num_layers):
        found += [Parameter(f"decoder.layers.{index}.{name}", shape, split) for name, shape, split in layer]
    found.append(Parameter(FINAL_NORM, (hidden,), None))
    if not model.tie_word_embeddings:
        found.append(Parameter(HEAD, vocabulary, "rows"))
    return found


def canonical_name(name: str, layer_offset: int, tied: bool) -> str:
    """The name in the whole model of a stage's parameter.

    name: as in `named_parameters()` of a stage, of either layer implementation; layer_offset: layers before this
    stage's first; tied: the head is the embedding.
    """
    if tied and name == HEAD:
        return EMBEDDING
    match = _LAYER.match(name)
    if match is None:
        return name
    within = name[match.end() :]
    return f"decoder.layers.{int(match[1]) + layer_offset}.{_FUSED_NORMS.get(within, within)}"


def layer_of(name: str) -> int | None:
    """Number of the layer a canonical name belongs to; None: embedding, final norm, head."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None

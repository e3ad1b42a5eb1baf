"""The mask predictor as llama.cpp's architecture `llada`: its names, order of rows and keys. What that architecture
cannot hold is refused, never left out.

Sources: llama.cpp, src/models/llada.cpp and conversion/llada.py; the keys' meaning:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
from typing import Any

from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.hugging_face.layouts import Layout
from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import EMBEDDING, FINAL_NORM, HEAD
from illada_megatron.config.schema import RopeScaling

ARCHITECTURE = "llada"

NAMES = Layout(
    model_type="llada",
    architecture=ARCHITECTURE,
    files=(),
    auto_map={},
    default_mask_token_id=126336,
    outside={EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"},
    layer="blk.{}.",
    in_layer={
        "input_layernorm.weight": "attn_norm.weight",
        "q": "attn_q.weight",
        "k": "attn_k.weight",
        "v": "attn_v.weight",
        "q bias": "attn_q.bias",
        "k bias": "attn_k.bias",
        "v bias": "attn_v.bias",
        "self_attention.linear_proj.weight": "attn_output.weight",
        "pre_mlp_layernorm.weight": "ffn_norm.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "mlp.linear_fc2.weight": "ffn_down.weight",
    },
)
_TURNED = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")


def is_turned(name: str) -> bool:
    """Whether a tensor makes what rotary embeddings turn: its heads are `interleaved`."""
    return name.endswith(_TURNED)


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads, [heads * d, ...], in llama.cpp's order: of this architecture it turns elements 2 i and
    2 i + 1 of a head together, the model here i and i + d / 2."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def check_architecture(model: ModelConfig) -> None:
    """Raises CheckpointError naming the field that llama.cpp's graph of the architecture has nothing for: it would run
    the file, and answer something else."""
    scaling = model.rope_scaling
    reasons = {
        "model.qk_layernorm": model.qk_layernorm and "it has no norms of queries and keys",
        "model.logit_softcap": model.logit_softcap and "it leaves logits as they are",
        "model.exclude_mask_logit": model.exclude_mask_logit
        and "the mask takes part in its softmax, with a row of the head that was never trained",
        "model.rope_scaling": scaling is not None and _unknown_scaling(scaling),
    }
    for field, reason in reasons.items():
        if reason:
            value = getattr(model, field.removeprefix("model."))
            value = value.model_dump(exclude_none=True) if isinstance(value, RopeScaling) else value
            raise CheckpointError(
                f"{field} is {value}, and llama.cpp's architecture {ARCHITECTURE} has no such thing ({reason}): this "
                "model cannot be a GGUF file; illada convert to-hf writes it"
            )


def add_architecture(writer: Any, model: ModelConfig) -> None:
    """Sizes and settings of a model that `check_architecture` has let pass. writer: gguf's GGUFWriter."""
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_sequence_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.ffn_hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_query_groups)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rotary_base)
    if model.rope_scaling is not None:
        _add_scaling(writer, model.rope_scaling)
    writer.add_causal_attention(False)
    # what llama-diffusion-cli asks for: logits at a position are for that position
    writer.add_diffusion_shift_logits(False)


def _unknown_scaling(scaling: RopeScaling) -> str | None:
    if scaling.rope_type == "llama3":
        return "its rotary embeddings take no factor for each frequency"
    # llama.cpp knows keys for these, which this architecture does not read
    if (scaling.beta_fast or 32.0) != 32.0 or (scaling.beta_slow or 1.0) != 1.0:
        return "its beta_fast and beta_slow are 32 and 1"
    return None


def _add_scaling(writer: Any, scaling: RopeScaling) -> None:
    import gguf

    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    if scaling.attention_factor is not None:
        # beside the paper's own, which it multiplies with in any case
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1))

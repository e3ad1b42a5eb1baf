"""Attention of the local layer spec: bidirectional, within each segment of a packed row."""

import math
from functools import lru_cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from illada_megatron.model.packing import Segments
from illada_megatron.ops.context_attention import context_attention
from illada_megatron.ops.segment_attention import segment_attention


class SegmentSelfAttention(SelfAttention):
    """megatron-core's self attention with its projections, whose core takes queries, keys and values unsplit.

    Splitting them, turning queries and keys by their position and attending is one operator then. Of a layer it keeps
    qkv, the output and a number a row for the backward pass, so that nothing is left for selective recomputation. Norms
    of queries and keys (model.qk_layernorm) come before it, and need qkv as it was besides.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: Segments,
        inference_context: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [t (/ tp with sequence parallelism), 1, h] -> the same, and linear_proj's bias (None)."""
        if attention_mask is not None:
            raise ValueError("SegmentSelfAttention isolates segments by cu_seqlens; attention_mask has to be None")
        if inference_context is not None:
            raise ValueError("SegmentSelfAttention keeps no cache of keys; inference_context has to be None")
        qkv, _bias = self.linear_qkv(hidden_states)
        if self.config.qk_layernorm:
            qkv = self._normalised(qkv)
        return self.linear_proj(self.core_attention(qkv, rotary_pos_emb, packed_seq_params))

    def _normalised(self, qkv: Tensor) -> Tensor:
        """qkv [t, 1, ng * (np / ng + 2) * d] of this rank's heads, each query and key over its root mean square."""
        heads = self.config.num_attention_heads // self.config.num_query_groups
        split = qkv.view(qkv.shape[0], -1, heads + 2, self.config.kv_channels)
        query, key, value = split.split([heads, 1, 1], dim=2)
        return torch.cat((self.q_layernorm(query), self.k_layernorm(key), value), dim=2).view_as(qkv)


class SegmentAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v within each segment, every position seeing every other of its segment, what other
    context-parallel ranks have of it too.

    Heads are this tensor-parallel rank's; grouped KV heads are shared by consecutive query heads. Positions restart in
    each segment.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.no_mask:
            raise ValueError(f"layer {layer_number}: expected a bidirectional layer (no_mask), found {attn_mask_type}")
        if attention_type != "self":
            raise ValueError(f"layer {layer_number}: expected self attention, found {attention_type}")
        self.layer_number = layer_number
        self.dim = config.kv_channels
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.scale = softmax_scale or 1 / math.sqrt(self.dim)

    def forward(self, qkv: Tensor, rotary_pos_emb: Tensor, packed_seq_params: Segments) -> Tensor:
        """qkv [t, 1, ng * (np / ng + 2) * d] of this rank's heads, angles [longest segment, 1, 1, d] -> [t, 1, np * d].

        The angles are megatron-core's: those of the first half of a head, then the same again.
        """
        tokens = qkv.shape[0]
        cos, sin = _cos_sin(rotary_pos_emb)
        split, cu_seqlens = qkv.view(tokens, -1, self.heads_per_group + 2, self.dim), packed_seq_params.cu_seqlens_q
        if (kept := packed_seq_params.kept) is not None:
            out = kept.attend(self.layer_number, split, cos, sin, self.scale)
        elif (padded := packed_seq_params.cu_seqlens_q_padded) is None:
            out = segment_attention(split, cos, sin, cu_seqlens, self.scale, packed_seq_params.lengths)
        else:
            group = parallel_state.get_context_parallel_group()
            out = context_attention(split, cos, sin, cu_seqlens, padded, self.scale, group)
        return out.view(tokens, 1, -1)


@lru_cache(maxsize=4)
def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 1, 1, d] float32 -> cosines and sines [n, d / 2]; once for all layers, which are given the same tensor."""
    half = angles[:, 0, 0, : angles.shape[-1] // 2]
    return half.cos(), half.sin()

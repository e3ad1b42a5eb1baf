"""The attention core of the local layer spec: bidirectional, one segment at a time, through torch's fused kernels."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SegmentAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v within each segment, every position seeing every other of its segment.

    megatron-core's own DotProductAttention refuses packed sequences; this takes them and nothing else. Heads are this
    tensor-parallel rank's; grouped KV heads are shared by consecutive query heads.
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
        self.softmax_scale = softmax_scale
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """query [t, np, d], key and value [t, ng, d] of this rank's heads -> [t, np * d]. attention_mask: None."""
        if attention_mask is not None:
            raise ValueError("SegmentAttention isolates segments by cu_seqlens; attention_mask has to be None")
        heads, dim = query.shape[1:]
        outputs = []
        for start, count, length in _runs(packed_seq_params.cu_seqlens_q):
            span = slice(start, start + count * length)
            q, k, v = (x[span].view(count, length, -1, dim).transpose(1, 2) for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale, enable_gqa=self.grouped)
            outputs.append(out.transpose(1, 2).reshape(count * length, heads * dim))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _runs(cu_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """(first token, number of segments, their length) of each run of equally long segments: one kernel call a run."""
    offsets = cu_seqlens.tolist()
    runs: list[tuple[int, int, int]] = []
    for start, end in pairwise(offsets):
        if runs and runs[-1][2] == end - start:
            first, count, length = runs[-1]
            runs[-1] = (first, count + 1, length)
        else:
            runs.append((start, 1, end - start))
    return runs

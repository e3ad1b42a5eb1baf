"""Variable-length attention's view of a batch: all tokens in one row, cut into segments by cumulative offsets."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def pack(cu_seqlens: Tensor, max_seqlen: int, cu_seqlens_padded: Tensor | None = None) -> PackedSeqParams:
    """Segments for megatron-core's attention.

    cu_seqlens: [n + 1] int32, offsets of the n segments in the flattened tokens; max_seqlen: the longest (tokens),
    given so that nobody has to ask the GPU for it. cu_seqlens_padded: with context parallelism their offsets in the row
    where each is padded; max_seqlen is the longest padded one then.
    """
    segments = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens_padded,
        cu_seqlens_kv_padded=cu_seqlens_padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    if cu_seqlens_padded is not None and hasattr(segments, "pad_between_seqs"):
        # of megatron-core 0.19: without it Transformer Engine compares the two offsets on the GPU, in every layer
        segments.pad_between_seqs = True
    return segments


def equal_segments(batch: int, length: int, device: torch.device | str) -> PackedSeqParams:
    """`batch` whole sequences of `length` tokens, nothing split."""
    return pack(torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device), length)

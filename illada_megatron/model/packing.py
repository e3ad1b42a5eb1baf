"""Variable-length attention's view of a batch: all tokens in one row, cut into segments by cumulative offsets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from illada_megatron.model.kept_keys import KeptPass


@dataclass
class Segments(PackedSeqParams):
    """What megatron-core's attention and this package's are told of the segments."""

    lengths: tuple[int, ...] = ()
    """Tokens of each, for those who have to know them where cu_seqlens are on a GPU."""
    kept: KeptPass | None = None
    """In generation: only some of the tokens are computed, and attend to what was kept of the others."""


def pack(
    cu_seqlens: Tensor, max_seqlen: int, lengths: Sequence[int] | None = None, cu_seqlens_padded: Tensor | None = None
) -> Segments:
    """Segments for a stage's layers.

    cu_seqlens: [n + 1] int32, offsets of the n segments in the flattened tokens; max_seqlen: the longest (tokens);
    lengths: of each. The last two are given so that nobody has to ask the GPU for them; it is asked once for lengths
    that are not (None). cu_seqlens_padded: with context parallelism their offsets in the row where each is padded;
    max_seqlen is the longest padded one then.
    """
    segments = Segments(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens_padded,
        cu_seqlens_kv_padded=cu_seqlens_padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        lengths=tuple(cu_seqlens.diff().tolist() if lengths is None else lengths),
    )
    if cu_seqlens_padded is not None and hasattr(segments, "pad_between_seqs"):
        # of megatron-core 0.19: without it Transformer Engine compares the two offsets on the GPU, in every layer
        segments.pad_between_seqs = True
    return segments


def equal_segments(batch: int, length: int, device: torch.device | str) -> Segments:
    """`batch` whole sequences of `length` tokens, nothing split."""
    cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    return pack(cu_seqlens, length, [length] * batch)

"""A micro-batch divided over context-parallel ranks.

All its tokens lie in one packed row, cut into segments. Each segment is padded to a multiple of 2 * ranks and cut into
as many equal chunks; rank r has chunks r and 2 * ranks - 1 - r of each, which is how Transformer Engine's attention and
megatron-core's rotary embedding find the positions of a rank's tokens (`_get_thd_freqs_on_this_cp_rank`). Noise and
labels are those of the whole batch, drawn before it is divided.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada_megatron.diffusion.batch import MaskedBatch


@dataclass(frozen=True)
class ContextShare:
    """What one of `ranks` context-parallel ranks has of a micro-batch whose row is r tokens long, padding included."""

    ranks: int
    cu_seqlens_padded: Tensor  # [n+1] int32, offsets of the padded segments in the row; the last is r
    max_seqlen: int  # length of the longest padded segment
    positions: Tensor  # [r / ranks] int64, where in the flattened b*s tokens each of the rank's lies; padding: -1
    tokens: Tensor  # [r / ranks] int64, noisy; of padding 0, which nobody sees. A middle stage has none of these: [0]
    labels: Tensor  # [r / ranks] int64, clean
    loss_weight: Tensor  # [r / ranks] float32, of padding 0


def context_share(
    cu_seqlens: Tensor, batch: MaskedBatch | None, rank: int, ranks: int, row_tokens: int | None, row_multiple: int
) -> ContextShare:
    """Rank `rank`'s part of a micro-batch with segments `cu_seqlens` `[n+1]`; batch: None for a middle stage.

    row_tokens: length of the row, a multiple of 2 * ranks; None: the shortest multiple of row_multiple that holds the
    padded segments. What is beyond them is padding of the last one.

    Raises ValueError where the padded segments are longer than row_tokens.
    """
    offsets = cu_seqlens.numpy().astype(np.int64)
    lengths, chunks = np.diff(offsets), 2 * ranks
    padded = -(-lengths // chunks) * chunks
    if row_tokens is None:
        row_tokens = -(-int(padded.sum()) // row_multiple) * row_multiple
    if padded.sum() > row_tokens:
        raise ValueError(
            f"{len(lengths)} segments take {padded.sum()} tokens when each is padded to a multiple of {chunks}, "
            f"expected at most the {row_tokens} of the row"
        )
    padded[-1] += row_tokens - padded.sum()
    cu_padded = np.concatenate([[0], padded.cumsum()]).astype(np.int32)
    positions = torch.from_numpy(_positions(offsets, lengths, padded // chunks, rank, chunks))
    none = torch.empty(0, dtype=torch.int64)
    wholes = (none, none, none.float())
    if batch is not None:
        wholes = (batch.tokens, batch.labels, batch.loss_weight)
    parts = [torch.where(positions >= 0, whole.view(-1)[positions], 0) if len(whole) else whole for whole in wholes]
    return ContextShare(ranks, torch.from_numpy(cu_padded), int(padded.max()), positions, *parts)


def _positions(
    offsets: NDArray[np.int64], lengths: NDArray[np.int64], chunk: NDArray[np.int64], rank: int, chunks: int
) -> NDArray[np.int64]:
    """Where the rank's tokens lie; chunk: length of each segment's chunks."""
    own = 2 * chunk
    segment = np.repeat(np.arange(len(own)), own)
    place = np.arange(own.sum()) - np.repeat(own.cumsum() - own, own)  # in the rank's part of its segment
    length, second = chunk[segment], place >= chunk[segment]
    within = place + np.where(second, chunks - 2 - rank, rank) * length
    return np.where(within < lengths[segment], offsets[segment] + within, -1)

"""The loss and its gradients chunk by chunk of masked rows: the logits of one chunk are all that ever exists.

For each chunk of c rows (X `[c, h]`, W `[v/tp, h]`; the sweeps are those of logit_sweeps.py):

    Z = X W^T, statistics of Z                    forward sweep      2 c h v/tp FLOPs
    combine over the ranks                        three numbers a row, 12 c bytes a rank
    G = d loss / d Z, dX = G W, dW += G^T X       backward sweep     4 c h v/tp FLOPs

The gradients are made in the forward pass because the loss is the end of the graph: nothing has to be kept or computed
again for the backward pass, which only scales. docs/masked_loss.md has the derivation.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from illada_megatron.ops.logit_passes import combine, statistics_dtype
from illada_megatron.ops.logit_sweeps import ALIGN_ROWS, Logits, Sweeps, memory_elements


@dataclass(frozen=True)
class Head:
    """The output embedding as this rank holds it, and how its logits become a loss."""

    weight: Tensor
    """`[real_rows, h]`, without padding"""
    width: int
    """Rows with padding, the same on all ranks of the group: they cut their losses into the same chunks."""
    z_loss: float
    softcap: float
    sweeps: Sweeps
    group: dist.ProcessGroup | None
    """The ranks that hold the other rows; None: there are none."""


class Gradients(NamedTuple):
    """Where a chunk's gradients go."""

    rows: Tensor  # [m, h], written in the inputs' dtype
    weight: Tensor  # [real_rows, h], added to; fp32, or the inputs' dtype
    scale: float  # both are those of scale * loss


class RowLosses(NamedTuple):
    """Of each row, `[m]` in the statistics' dtype."""

    cross_entropy: Tensor
    log_normalizer: Tensor


@dataclass
class _Chunk:
    """A chunk whose logits are made and whose statistics are on their way between the ranks."""

    rows: slice
    logits: Logits  # as the sweeps lay them out
    statistics: Tensor  # [3, c], of this rank's columns
    gathered: Tensor | None  # [tp, 3, c]
    work: dist.Work | None

    def whole_rows(self) -> Tensor:
        """Statistics over all ranks' columns, the same on every rank to the last bit."""
        if self.gathered is None:
            return self.statistics
        assert self.work is not None
        self.work.wait()
        return combine(self.gathered)


def chunk_rows(hidden: Tensor, head: Head, memory_bytes: int) -> int:
    """Rows of a chunk of hidden `[m, h]`, so that the logits that exist at a time fit in memory_bytes; at least 32 (or
    m). Chunks are nearly alike."""
    m, width = hidden.shape[0], head.width
    fit = memory_bytes // (_buffers(hidden, head) * max(width, 1) * hidden.element_size())
    most = max(fit // ALIGN_ROWS, 1) * ALIGN_ROWS
    rows = -(-m // max(-(-m // most), 1))
    return max(min(-(-rows // ALIGN_ROWS) * ALIGN_ROWS, m), 1)


def _buffers(hidden: Tensor, head: Head) -> int:
    """Chunks of logits at a time. Two: while the ranks exchange a chunk's statistics the next chunk's logits are made.
    A CPU has nothing to spare for that."""
    return 2 if head.group is not None and hidden.is_cuda else 1


def losses_and_gradients(
    hidden: Tensor, head: Head, targets: Tensor, row_weight: Tensor, memory_bytes: int, into: Gradients | None
) -> RowLosses:
    """Losses of the rows of hidden `[m, h]`; their gradients go to `into` (None: no gradients).

    targets: `[m]` int64 relative to this rank's first id; row_weight: `[m]` in the statistics' dtype.
    memory_bytes: what the logits that exist at a time may take.
    """
    m, width = hidden.shape[0], head.weight.shape[0]
    buffers, rows = _buffers(hidden, head), chunk_rows(hidden, head, memory_bytes)
    chunks = [slice(start, min(start + rows, m)) for start in range(0, m, rows)]
    memory = hidden.new_empty(min(buffers, len(chunks)), memory_elements(rows, width, head.sweeps.parts))
    dtype = statistics_dtype(hidden.dtype)
    losses = RowLosses(*(torch.empty(m, dtype=dtype, device=hidden.device) for _ in range(2)))

    begun: deque[_Chunk] = deque()
    for number, part in enumerate(chunks):
        begun.append(_begin(part, memory[number % buffers], hidden, head, targets))
        if len(begun) == buffers:
            _finish(begun.popleft(), hidden, head, targets, row_weight, losses, into)
    for chunk in begun:
        _finish(chunk, hidden, head, targets, row_weight, losses, into)
    return losses


def _begin(rows: slice, memory: Tensor, hidden: Tensor, head: Head, targets: Tensor) -> _Chunk:
    """Logits of a chunk, their statistics, and the collective that takes these to the other ranks."""
    logits, statistics = head.sweeps.forward(memory, hidden[rows], head.weight, targets[rows], head.softcap)
    if head.group is None:
        return _Chunk(rows, logits, statistics, None, None)
    # One all-gather instead of three all-reduces; the sum's order, hence its rounding, is the same on every rank
    tp = head.group.size()
    gathered = statistics.new_empty(tp * 3, statistics.shape[1])
    work = dist.all_gather_single(gathered, statistics, group=head.group, async_op=True)
    return _Chunk(rows, logits, statistics, gathered.view(tp, 3, -1), work)


def _finish(
    chunk: _Chunk,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    row_weight: Tensor,
    losses: RowLosses,
    into: Gradients | None,
) -> None:
    """Losses of a chunk, and its gradients."""
    rows = chunk.rows
    largest, exp_sum, label_logit = chunk.whole_rows()
    log_sum = exp_sum.log()
    log_normalizer = largest + log_sum
    losses.log_normalizer[rows] = log_normalizer
    # (largest - label) first: exact where the label is the most probable token, whatever the size of the logits
    losses.cross_entropy[rows] = (largest - label_logit) + log_sum
    if into is None:
        return
    label_scale = row_weight[rows] * into.scale
    softmax_scale = label_scale * (1 + 2 * head.z_loss * log_normalizer)
    row_values = torch.stack((largest, log_sum, softmax_scale, label_scale))
    head.sweeps.backward(
        chunk.logits, hidden[rows], head.weight, targets[rows], row_values, head.softcap, into.rows[rows], into.weight
    )

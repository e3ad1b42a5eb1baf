"""Which rows of the flattened tokens are masked, and how their hidden states travel over the tensor-parallel group.

Only masked rows are moved: about half of a diffusion batch is never multiplied with the head, so it is not sent."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class MaskedRows:
    """The masked rows of `[n, h]` hidden states, replicated over the group or cut along n (sequence parallelism).

    Every rank of the group holds the same `rows`, hence knows how many masked rows each slice has and issues the same
    collectives. With no masked row no rank issues any.
    """

    rows: Tensor  # [m] int64, ascending positions in the flattened tokens
    group: dist.ProcessGroup | None  # None: this process is the whole group
    local_rows: Tensor  # [m_local] int64, positions in this rank's hidden
    slots: Tensor | None  # [m] int64, where each row lies in the gathered [tp * m_slice, h]; None: hidden is whole
    m_slice: int  # most masked rows in one slice: slices are padded to it

    @classmethod
    def locate(cls, loss_weight: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> "MaskedRows":
        """Rows whose `loss_weight [n]` is not 0. `group` None or of one rank: nothing travels.

        A GPU's weights make the host wait for it. A loader asks for the rows of those that it has on the CPU, and moves
        them (`tensor_fields.moved_to`).
        """
        rows = loss_weight.nonzero().flatten()
        tp, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        if group is None or tp == 1:
            return cls(rows, None, rows, None, 0)
        if not sequence_parallel:
            return cls(rows, group, rows, None, 0)
        slice_tokens = loss_weight.numel() // tp
        owner = rows // slice_tokens
        counts = torch.bincount(owner, minlength=tp)
        first = counts.cumsum(0) - counts  # [tp], index in rows of each slice's first masked row
        m_slice = int(counts.max())
        slots = owner * m_slice + torch.arange(rows.numel(), device=rows.device) - first[owner]
        local_rows = rows[owner == rank] - rank * slice_tokens
        return cls(rows, group, local_rows, slots, m_slice)

    def gather(self, hidden: Tensor) -> Tensor:
        """Masked rows of all tokens, `[m, h]`, from `hidden` `[n, h]` (sequence parallelism: `[n/tp, h]`).

        Differentiable: each rank's gradient is its vocabulary range's part, and the parts are summed over the group.
        """
        gathered: Tensor = _Gather.apply(hidden, self)
        return gathered

    def collect(self, hidden: Tensor) -> Tensor:
        """`gather` without its derivative."""
        mine = hidden.index_select(0, self.local_rows)
        if self.slots is None or self.group is None or self.m_slice == 0:
            return mine
        sent = _padded(mine, self.m_slice)
        gathered = sent.new_empty(self.group.size() * self.m_slice, sent.shape[1])
        dist.all_gather_single(gathered, sent, group=self.group)
        return gathered.index_select(0, self.slots)

    def distribute(self, grad_rows: Tensor, local_tokens: int) -> Tensor:
        """The adjoint of `collect` for parts of a sum: `grad_rows` `[m, h]` (overwritten) summed over the group, at
        this rank's positions of `[local_tokens, h]`, zero elsewhere."""
        mine = grad_rows
        if self.group is not None and self.rows.numel() > 0:
            if self.slots is None:
                dist.all_reduce(grad_rows, group=self.group)
            else:
                sent = grad_rows.new_zeros(self.group.size() * self.m_slice, grad_rows.shape[1])
                sent.index_copy_(0, self.slots, grad_rows)
                received = sent.new_empty(self.m_slice, sent.shape[1])
                dist.reduce_scatter_single(received, sent, group=self.group)
                mine = received[: self.local_rows.numel()]
        return mine.new_zeros(local_tokens, mine.shape[1]).index_copy_(0, self.local_rows, mine)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, masked: MaskedRows) -> Tensor:
        ctx.masked, ctx.local_tokens = masked, hidden.shape[0]
        return masked.collect(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        # copied where it would be overwritten: autograd may have given the same tensor to others
        grad_rows = grad_rows if ctx.masked.group is None else grad_rows.clone()
        return ctx.masked.distribute(grad_rows, ctx.local_tokens), None


def _padded(rows: Tensor, length: int) -> Tensor:
    padded = rows.new_zeros(length, rows.shape[1])
    padded[: rows.shape[0]] = rows
    return padded

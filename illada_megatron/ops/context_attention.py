"""Segment attention whose tokens are divided over context-parallel ranks, each segment in zigzag chunks.

Each rank turns its own queries and keys by their positions, gathers keys and values of all ranks, and attends with its
own queries to the whole segments. Gathering is repeated in the backward pass, so that a layer keeps its own tokens
only; gradients of keys and values are summed over the ranks in fp32. Of torch's operators: on GPUs Transformer Engine
has a ring, this is for where there is none.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.ops.segment_attention import rotate


def context_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_padded: Tensor,
    scale: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """Attention of this rank's queries within their segments. All ranks of `group` call it together.

    Args:
        qkv: `[t, ng, r + 2, d]` of this rank's t tokens: of each segment, padded to chunks of equal length, chunk
            `rank` and chunk `2 * ranks - 1 - rank`.
        cos, sin: `[n, d / 2]` float32, n at least the longest padded segment: angles of each position.
        cu_seqlens: `[segments + 1]` int32, offsets of the segments without padding.
        cu_seqlens_padded: the same of the padded segments; the last is t * ranks.
        scale: of the scores, positive.

    Returns:
        `[t, ng * r, d]` of qkv's dtype, zero at padding.
    """
    plan = _plan(cu_seqlens, cu_seqlens_padded, group.rank(), group.size())
    turn = (cos[plan.position][:, None, None], sin[plan.position][:, None, None])
    query = rotate(qkv[:, :, :-2], *turn).reshape(len(qkv), -1, qkv.shape[3])
    keys_values = torch.cat((rotate(qkv[:, :, -2:-1], *turn), qkv[:, :, -1:]), dim=2)
    out: Tensor = _Attention.apply(query, keys_values, plan, scale, group)
    return out


@dataclass(frozen=True)
class _Plan:
    """Where a rank's tokens and everybody's lie."""

    position: Tensor  # [t] int64, of each own token in its segment, padding's too
    queries: Tensor  # [q] int64, rows of the own tokens that are no padding, segment after segment
    keys: Tensor  # [k] int64, rows of the gathered keys, in order, of each segment that has own queries
    query_lengths: list[int]  # of each of these segments
    key_lengths: list[int]


@lru_cache(maxsize=4)
def _plan(cu_seqlens: Tensor, cu_seqlens_padded: Tensor, rank: int, ranks: int) -> _Plan:
    """Once a micro-batch: all layers are given the same tensors."""
    lengths, padded = cu_seqlens.diff().tolist(), cu_seqlens_padded.diff().tolist()
    device, tokens = cu_seqlens.device, sum(padded) // ranks
    positions, begin = [], 0
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for length, whole in zip(lengths, padded, strict=True):
        chunk = whole // (2 * ranks)
        of_ranks = [_zigzag(chunk, one, ranks) for one in range(ranks)]
        positions.append(of_ranks[rank])
        gathered = torch.empty(whole, dtype=torch.int64)
        for one, own in enumerate(of_ranks):
            gathered[own] = torch.arange(2 * chunk) + one * tokens + begin
        rows = (of_ranks[rank] < length).nonzero().flatten() + begin
        if rows.numel():
            queries.append(rows)
            keys.append(gathered[:length])
        begin += 2 * chunk
    none = torch.empty(0, dtype=torch.int64)
    position, picked, seen = (torch.cat([none, *parts]).to(device) for parts in (positions, queries, keys))
    return _Plan(position, picked, seen, [len(rows) for rows in queries], [len(rows) for rows in keys])


def _zigzag(chunk: int, rank: int, ranks: int) -> Tensor:
    """Positions in a segment of a rank's two chunks of it, `[2 * chunk]`."""
    first = torch.arange(chunk)
    return torch.cat((first + rank * chunk, first + (2 * ranks - 1 - rank) * chunk))


class _Attention(torch.autograd.Function):
    """query [t, np, d], keys_values [t, ng, 2, d] of this rank -> [t, np, d]. As one function, every rank issues the
    same collectives, whether or not any of its own tokens is in a segment."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys_values: Tensor, plan: _Plan, scale: float, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(query, keys_values)
        ctx.plan, ctx.scale, ctx.group = plan, scale, group
        return _attend(query, _gathered(keys_values, group), plan, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, keys_values = ctx.saved_tensors
        query = query.detach().requires_grad_()
        everybodys = _gathered(keys_values, ctx.group).requires_grad_()
        with torch.enable_grad():
            out = _attend(query, everybodys, ctx.plan, ctx.scale)
        if ctx.plan.query_lengths:
            grad_query, grad_all = torch.autograd.grad(out, (query, everybodys), grad_out)
        else:
            grad_query, grad_all = torch.zeros_like(query), torch.zeros_like(everybodys)
        total = torch.empty(keys_values.shape, dtype=torch.float32, device=keys_values.device)
        dist.reduce_scatter_single(total, grad_all.float().contiguous(), group=ctx.group)
        return grad_query, total.to(keys_values.dtype), None, None, None


def _gathered(keys_values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, ng, 2, d] of each rank -> [ranks * t, ng, 2, d]."""
    everybodys = keys_values.new_empty(group.size() * keys_values.shape[0], *keys_values.shape[1:])
    dist.all_gather_single(everybodys, keys_values.detach().contiguous(), group=group)
    return everybodys


def _attend(query: Tensor, keys_values: Tensor, plan: _Plan, scale: float) -> Tensor:
    """Rows are picked and put back once for all segments: of each alone, autograd would copy the whole once more."""
    out = torch.zeros_like(query)
    if not plan.query_lengths:
        return out
    queries = query.index_select(0, plan.queries).split(plan.query_lengths)
    everybodys = keys_values.index_select(0, plan.keys).split(plan.key_lengths)
    attended = []
    for own, whole in zip(queries, everybodys, strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (own, *whole.unbind(2)))
        of_segment = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        attended.append(of_segment.squeeze(0).transpose(0, 1))
    return out.index_copy(0, plan.queries, torch.cat(attended))

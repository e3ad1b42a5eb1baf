"""Bidirectional attention over packed segments, with rotary embedding, straight from the projection's output.

    q_i, k_i = rotated by the position of i in its segment
    out_i = sum over j in the segment of i of  softmax_j(scale * q_i . k_j) v_j

On a CPU the compiled operator `illada::segment_attention` (csrc/layer_kernels) keeps no scores and makes no copy of
queries, keys or values; elsewhere torch's own operators do the same.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from illada_megatron.ops import kernels

_OPERATOR = "segment_attention"


@cache
def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled operator cannot be used on `device` with `dtype`; None: it can, and is."""
    if (reason := kernels.missing(_OPERATOR, device)) is not None:
        return reason
    if not kernels.has_cpu_products(dtype):
        return f"this processor multiplies no {str(dtype).removeprefix('torch.')} pairs in oneDNN"
    return None


def segment_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, scale: float, lengths: Sequence[int] | None = None
) -> Tensor:
    """Attention of every query head within its segment.

    Args:
        qkv: `[t, ng, r + 2, d]`, for each of ng groups its r query heads, its key and its value (the order of
            megatron-core's linear_qkv).
        cos, sin: `[n, d / 2]` float32, n at least the longest segment: angles of each position.
        cu_seqlens: `[segments + 1]` int32 on qkv's device, from 0 to t.
        scale: of the scores, positive.
        lengths: of the segments; None: a GPU makes the host wait for them.

    Returns:
        `[t, ng * r, d]` of qkv's dtype. Statistics and rotation are in float32.

    Raises:
        TypeError, ValueError, RuntimeError: a dtype, a value or a shape is not as above.
    """
    if missing(qkv.device, qkv.dtype) is not None:
        lengths = cu_seqlens.diff().tolist() if lengths is None else lengths
        return segment_attention_reference(qkv, cos, sin, lengths, scale)
    out, _ = torch.ops.illada.segment_attention(qkv, cos, sin, cu_seqlens, scale)
    return out


def segment_attention_reference(qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """The same of torch's operators: any device, dtype and order of derivative."""
    heads, dim = qkv.shape[1] * (qkv.shape[2] - 2), qkv.shape[3]
    outputs = []
    for start, count, length in _runs(lengths):
        rows = qkv[start : start + count * length].view(count, length, *qkv.shape[1:])
        turn = (cos[:length, None, None], sin[:length, None, None])
        query, key = (rotate(x, *turn) for x in (rows[..., :-2, :], rows[..., -2:-1, :]))
        q, k, v = (x.reshape(count, length, -1, dim).transpose(1, 2) for x in (query, key, rows[..., -1:, :]))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out.transpose(1, 2).reshape(count * length, heads, dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., length, ng, heads, d] turned by angles [length, 1, 1, d / 2]; a head's halves are the two coordinates."""
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first token, number of segments, their length) of each run of equally long segments: one kernel call a run.
    Empty ones are left out."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in filter(None, lengths):
        if runs and runs[-1][2] == length:
            first, count, _ = runs[-1]
            runs[-1] = (first, count + 1, length)
        else:
            runs.append((start, 1, length))
        start += length
    return runs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cos, sin, cu_seqlens, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, cos, sin, cu_seqlens, out, lse)


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 5
    grad_qkv = torch.ops.illada.segment_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return (grad_qkv, None, None, None, None)


def _forward_flops(qkv: Tensor, *arguments: Any, **_: Any) -> int:
    """Of the two products, q k^T and P v: what torch.utils.flop_counter is told."""
    groups, heads, dim = qkv.shape[1:]
    cu_seqlens = arguments[2]
    return 4 * groups * (heads - 2) * dim * int(cu_seqlens.diff().long().square().sum())


def _backward_flops(_: Tensor, *arguments: Any, **__: Any) -> int:
    """Of the five products: q k^T again, dO v^T, P^T dO, dS^T q, dS k."""
    return 5 * _forward_flops(*arguments) // 2


if kernels.load_error() is None:
    torch.library.register_autograd(f"illada::{_OPERATOR}", _backward, setup_context=_setup_context)
    register_flop_formula(torch.ops.illada.segment_attention, get_raw=True)(_forward_flops)
    register_flop_formula(torch.ops.illada.segment_attention_backward, get_raw=True)(_backward_flops)

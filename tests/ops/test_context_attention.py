"""Attention over context-parallel ranks against the same on one: values and gradients, real processes over gloo."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from illada_megatron.diffusion.context import context_share
from illada_megatron.ops.context_attention import context_attention
from illada_megatron.ops.segment_attention import segment_attention_reference

GROUPS, HEADS, DIM, SCALE = 2, 3, 8, 0.3
# the third has a rank without any token of its own: its row is mostly padding
CASES = {"whole": ([24], None), "cut": ([5, 19], None), "mostly padding": ([6], 48), "documents": ([1, 9, 2, 4], 96)}


class _Calls(TorchDispatchMode):
    """How often each of torch's operators is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _inputs(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(sum(lengths), GROUPS, HEADS + 2, DIM, generator=generator, dtype=torch.float64)
    grad = torch.randn(sum(lengths), GROUPS * HEADS, DIM, generator=generator, dtype=torch.float64)
    angles = torch.outer(torch.arange(96.0), 1 / 100.0 ** torch.linspace(0, 1, DIM // 2))
    return qkv, grad, angles.cos(), angles.sin(), torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def _work(rank: int, ranks: int, directory: str) -> None:
    """Compute this rank's part of every case and keep it by the places of its tokens."""
    dist.init_process_group("gloo")
    for name, (lengths, row) in CASES.items():
        qkv, grad, cos, sin, cu_seqlens = _inputs(lengths)
        share = context_share(cu_seqlens, None, rank, ranks, row, 1)
        real = share.positions >= 0
        own = torch.where(real[:, None, None, None], qkv[share.positions], 7.0).requires_grad_()
        with _Calls() as calls:
            out = context_attention(own, cos, sin, cu_seqlens, share.cu_seqlens_padded, SCALE, dist.group.WORLD)
        assert not out[~real].any()
        # of the whole row, however many segments it has: the time would grow with their square
        assert calls.names["index_copy"] <= 1
        with _Calls() as calls:
            out.backward(torch.where(real[:, None, None], grad[share.positions], 0.0))
        assert calls.names["index_add"] + calls.names["index_add_"] + calls.names["index_put_"] <= 2
        assert own.grad is not None
        assert not own.grad[~real].any()
        found = (share.positions[real], out[real].detach(), own.grad[real])
        torch.save(found, f"{directory}/{name} {rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_equals_attention_on_one_rank(ranks: int, tmp_path: Path) -> None:
    """A rank that attends to another's padding, a key turned by another position, a gradient that stays with the rank
    that computed it."""
    run_ranks(_work, ranks, ranks, str(tmp_path))
    for name, (lengths, _) in CASES.items():
        qkv, grad, cos, sin, cu_seqlens = _inputs(lengths)
        whole = qkv.clone().requires_grad_()
        out = segment_attention_reference(whole, cos, sin, cu_seqlens.diff().tolist(), SCALE)
        out.backward(grad)
        assert whole.grad is not None
        parts = [torch.load(tmp_path / f"{name} {rank}.pt") for rank in range(ranks)]
        places, values, gradients = (torch.cat(kind) for kind in zip(*parts, strict=True))
        assert sorted(places.tolist()) == list(range(sum(lengths))), name
        torch.testing.assert_close(values, out.detach()[places])
        # gradients of keys and values are summed in fp32
        torch.testing.assert_close(gradients, whole.grad[places], rtol=1e-5, atol=1e-6)

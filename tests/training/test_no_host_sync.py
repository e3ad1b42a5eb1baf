"""A step's forward and backward pass ask the device for nothing: the host would wait for it, and then it for the host.
Followed on a CPU, with the operators that a GPU without Transformer Engine runs."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from illada_megatron.config import load_config
from illada_megatron.ops import kernels, loss_operators, rms_norm, segment_attention, swiglu
from illada_megatron.runtime import runtime

aten = torch.ops.aten
# What has a shape, or a value on the host, that only the device knows
_WAITING = (
    *(aten._local_scalar_dense, aten.nonzero, aten.bincount, aten.masked_select, aten.is_nonzero, aten.item),
    *(aten._unique2, aten._unique, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten.equal),
)
# What a CPU tensor answers without an operator
_READING = {
    getattr(torch.Tensor, name) for name in ("tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__")
}
_READING |= {torch.Tensor.__index__, torch.Tensor.__array__, torch.Tensor.nonzero}


class _Follower(TorchDispatchMode):
    """Counts operators and remembers those that wait; looks into the loss's operators, which are one each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func.overloadpacket)] += 1
        if func.overloadpacket in _WAITING or _picks_by_mask(func, args):
            self.waiting.append(str(func))
        inside = _INSIDE.get(func)
        if inside is None:
            return func(*args, **(kwargs or {}))
        with self:
            return inside(*args, **(kwargs or {}))


class _Reader(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            self.waiting.append(str(func))
        return func(*args, **(kwargs or {}))


_INSIDE: dict[Any, Callable[..., Any]] = {
    one._opoverload: one._init_fn for one in (loss_operators._loss, loss_operators._loss_into)
}


def _picks_by_mask(func: Any, args: Iterable[Any]) -> bool:
    if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return False
    indices = list(args)[1]
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the operators that only a CPU has."""
    reason: Callable[..., str] = lambda *_: "followed as on a GPU"  # noqa: E731
    for module in (segment_attention, rms_norm, swiglu):
        monkeypatch.setattr(module, "missing", reason)
    monkeypatch.setattr(kernels, "has_cpu_products", lambda *_: False)


def _followed_step(arguments: tuple[str, ...]) -> tuple[_Follower, _Reader]:
    from illada_megatron.training import train_step
    from illada_megatron.training import trainer as module
    from illada_megatron.training.setup import setup

    config = load_config(None, arguments)
    follower, reader = _Follower(), _Reader()
    original = module.run_schedule

    def followed(*given: Any, **named: Any) -> Any:
        with reader, follower:
            return original(*given, **named)

    with runtime(config) as run, pytest.MonkeyPatch.context() as patch:
        state = setup(config, run)
        patch.setattr(module, "run_schedule", followed)
        record, _ = train_step(state)
        state.close()
    assert record.loss > 1.0
    return follower, reader


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("model.tie_word_embeddings=false", "training.precision=bf16", "training.recompute=full"),
        ("model.exclude_mask_logit=true", "diffusion.loss_weight=clipped", "diffusion.t_per=segment"),
    ],
    ids=["tied", "untied, bf16, recomputed", "another noise"],
)
def test_a_step_waits_for_nothing(
    options: tuple[str, ...], tiny_run: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_on_a_gpu(monkeypatch)
    chunks = ("loss.implementation=reference", "loss.chunk_memory_mb=1", "diffusion.split_probability=0.9")
    follower, reader = _followed_step((*tiny_run, *chunks, *options))
    for name in ("index_add_", "embedding", "mm", "scatter_", "_assert_async"):  # all of it was followed
        assert follower.seen[f"aten.{name}"] > 0, (name, follower.seen)
    assert follower.waiting == []
    assert reader.waiting == []


def test_the_follower_sees_what_waits() -> None:
    """In the forward and the backward pass, and inside of a loss's operator."""

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.bincount(gradient.long()).max().item()

    follower, reader = _Follower(), _Reader()
    with reader, follower:
        x = torch.ones(3, requires_grad=True)
        Counting.apply(x).sum().backward()
        x.detach()[x > 0]
        torch.ones(3).unique()
        torch.ones(2, dtype=torch.int32).tolist()
    waiting = " ".join(follower.waiting)
    for name in ("bincount", "_local_scalar_dense", "index", "unique"):
        assert name in waiting, name
    assert any("tolist" in one for one in reader.waiting)


def test_what_a_caller_does_not_know_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss without its rows waits, which a follower that looks past it would not see."""
    from illada_megatron.ops import masked_linear_cross_entropy

    hidden = torch.randn(8, 4, requires_grad=True)
    follower = _Follower()
    with follower:
        masked_linear_cross_entropy(
            hidden, torch.randn(16, 4), torch.zeros(8, dtype=torch.int64), torch.ones(8), vocab_size=16
        )
    assert any("nonzero" in one for one in follower.waiting)

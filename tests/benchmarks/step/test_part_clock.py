"""The breakdown's clock charges each module's own forward and backward work, neither its neighbour's."""

import time
from typing import Any

import torch

from benchmarks.step.part_clock import Key, PartClock


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return grad, None, None


class _Sleeper(torch.nn.Module):
    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.seconds = forward_s, backward_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(x, *self.seconds)


def test_every_module_is_charged_for_its_own_forward_and_backward() -> None:
    inner, outer, last = _Sleeper(0.01, 0.04), _Sleeper(0.02, 0.06), _Sleeper(0.03, 0.08)
    nested = torch.nn.Sequential(outer, inner)
    weight = torch.ones(4, requires_grad=True)
    rest = Key("rest", "")
    slow_accumulation = weight.expand_as(weight).grad_fn.next_functions[0][0]
    slow_accumulation.register_hook(lambda *_: time.sleep(0.05))

    with PartClock(rest) as clock:
        clock.follow_module(nested, Key("nested", "own"), after=rest)
        clock.follow_module(inner, Key("nested", "inner"), after=Key("nested", "own"))
        clock.follow_module(last, Key("last", ""), after=rest)
        clock.follow_accumulation(weight, Key("weight", ""))
        clock.restart()
        started = time.perf_counter()
        time.sleep(0.01)
        hidden = nested(weight * 2)
        _Sleep.apply(last(hidden), 0.01, 0.02).sum().backward()
        clock.switch(rest)
        whole_s = time.perf_counter() - started

    expected = {("nested", "own"): 0.08, ("nested", "inner"): 0.05, ("last", ""): 0.11, ("weight", ""): 0.05}
    expected[tuple(rest)] = 0.04
    charged = {tuple(key): spent.seconds for key, spent in clock.spent.items()}
    assert charged.keys() == expected.keys()
    for key, seconds in expected.items():  # a sleep may last longer, never shorter, on a busy machine
        assert seconds <= charged[key] < seconds + 0.03, (key, charged)
    assert abs(sum(charged.values()) - whole_s) < 0.001

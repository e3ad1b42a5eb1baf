"""Where a step's time goes: a clock that is always charging exactly one part, in the forward and the backward pass.

Parts are entered and left by hooks at their borders: around a module's forward, and where the gradient of its output
arrives and that of its input leaves. Between the two the autograd engine runs the part's own backward nodes, newest
first, so that everything in between belongs to it. As one part is charged at any time, the parts sum to the step.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor


class Key(NamedTuple):
    """What is charged."""

    part: str
    detail: str


@dataclass
class Spent:
    """Time charged to a key."""

    seconds: float = 0.0
    """Wall."""
    cpu_seconds: float = 0.0
    """All threads of the process."""


class PartClock(ExitStack):
    """Follows modules, functions and parameters until the context ends; then everything is as before.

    start: charged from the beginning; synchronize: called before each reading (a GPU's work is asynchronous).
    """

    def __init__(self, start: Key, synchronize: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.spent: defaultdict[Key, Spent] = defaultdict(Spent)
        self._current = start
        self._synchronize = synchronize
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def switch(self, key: Key) -> Key:
        """From now on charge `key`; returns what was charged until now."""
        if self._synchronize is not None:
            self._synchronize()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        spent = self.spent[self._current]
        spent.seconds += wall_s - self._wall_s
        spent.cpu_seconds += cpu_s - self._cpu_s
        self._wall_s, self._cpu_s = wall_s, cpu_s
        before, self._current = self._current, key
        return before

    def restart(self) -> None:
        """Forget what was charged so far."""
        self.switch(self._current)
        self.spent.clear()

    @contextmanager
    def inside(self, key: Key) -> Iterator[None]:
        """Charge `key`, then again what was charged before."""
        before = self.switch(key)
        try:
            yield
        finally:
            self.switch(before)

    def follow_call(self, owner: Any, name: str, key: Key) -> None:
        """Charge calls of `owner.name` to `key`."""
        self._replace(owner, name, lambda original: wraps(original)(self._timed(original, key)))

    def follow_module(self, module: torch.nn.Module, key: Key, after: Key) -> None:
        """Charge a module's forward and backward to `key`.

        after: charged once the gradients of all its positional tensor inputs are there. A module whose inputs take no
        gradient (an embedding) is charged until the next switch.
        """
        before: list[Key] = []

        def leave_forward(*_: Any) -> None:
            self.switch(before.pop())

        handles = [
            module.register_forward_pre_hook(lambda *_: before.append(self.switch(key))),
            module.register_forward_hook(leave_forward),
            module.register_full_backward_pre_hook(lambda *_: self._enter(key)),
        ]
        if key != after:
            handles.append(module.register_full_backward_hook(lambda *_: self._enter(after)))
        for handle in handles:
            self.callback(handle.remove)

    def follow_loss(self, owner: Any, name: str, key: Key, after: Key) -> None:
        """Charge a function of (hidden, ...) whose first result is the loss, forward and backward, to `key`."""

        def timed(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                with self.inside(key):
                    result = original(hidden, *args, **kwargs)
                if hidden.requires_grad:
                    result[0].grad_fn.register_prehook(lambda *_: self._enter(key))
                    hidden.register_hook(lambda _: self._enter(after))
                return result

            return wraps(original)(call)

        self._replace(owner, name, timed)

    def follow_accumulation(self, parameter: Tensor, key: Key) -> None:
        """Charge the addition of a micro-batch's gradient to the parameter's main gradient to `key`.

        Call it after data parallelism has set its own hooks on the parameter: the engine runs hooks in order.
        """
        before: list[Key] = []
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        arrives = parameter.register_hook(lambda _: before.append(self.switch(key)))
        leaves = node.register_hook(lambda *_: self._enter(before.pop()))
        self.callback(arrives.remove)
        self.callback(leaves.remove)

    def _enter(self, key: Key) -> None:
        # a hook's result would replace the gradient
        self.switch(key)

    def _timed(self, function: Callable[..., Any], key: Key) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.inside(key):
                return function(*args, **kwargs)

        return call

    def _replace(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))

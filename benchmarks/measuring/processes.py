"""Processes that measure, one a variant, so that each has its peak memory to itself and all can take turns."""

import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any


class Fp32Precision(StrEnum):
    """torch.set_float32_matmul_precision"""

    highest = "highest"
    high = "high"
    medium = "medium"


@dataclass(frozen=True)
class Timing:
    """One repetition."""

    seconds: float
    cpu_seconds: float
    """All threads of the process."""
    loss: float | None = None
    """What it computed; None: nothing that has a loss."""


def timed(function: Callable[[], float | None]) -> Timing:
    """Call `function`, which returns the loss when its work is done."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    loss = function()
    return Timing(time.perf_counter() - wall_s, time.process_time() - cpu_s, loss)


class MeasuringProcess:
    """`target(connection, *arguments)` in a process of its own, from this side. It answers one command at a time."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: Any, seconds: float | None = None) -> None:
        """seconds: after which it is killed, if it has not ended."""
        self.name = name
        self._end = None if seconds is None else time.monotonic() + seconds
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def receive(self) -> Any:
        """Its next answer; exits with 1 where it died or was killed, having said why on stderr."""
        if self._end is not None and not self._connection.poll(max(self._end - time.monotonic(), 0.0)):
            print(f"{self.name}: no time is left for it", file=sys.stderr)
            self._process.kill()
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            print(f"{self.name}: its process ended with {self._process.exitcode}", file=sys.stderr)
            sys.exit(1)

    def ask(self, command: str, *arguments: Any) -> Any:
        """Send a command and wait for the answer."""
        self._connection.send((command, *arguments))
        return self.receive()

    def finish(self, *arguments: Any) -> Any:
        """Ask for what was found, and wait until the process has ended and its memory is free."""
        found = self.ask("finish", *arguments)
        self._process.join(None if self._end is None else max(self._end - time.monotonic(), 0.0))
        if self._process.is_alive():  # a GPU's libraries may hang when they are taken apart
            print(f"{self.name}: has not ended, and is killed", file=sys.stderr)
            self._process.kill()
            self._process.join()
        return found

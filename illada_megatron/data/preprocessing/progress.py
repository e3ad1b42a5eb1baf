"""A bar over the input's bytes with the rates that matter: how fast text goes in, how fast tokens come out."""

import sys
import time
from typing import TYPE_CHECKING, Self

from illada_megatron.system.terminal import say

if TYPE_CHECKING:
    from rich.progress import Progress


class ProgressBar:
    """Of all workers together. show None: where stderr is a terminal. log_interval_seconds: where there is no bar, a
    line on stderr that often (0: none), for a batch system's log."""

    def __init__(self, total_bytes: int, done_bytes: int, show: bool | None, log_interval_seconds: float) -> None:
        show = sys.stderr.isatty() if show is None else show
        self._started = self._logged = time.perf_counter()
        self._log_interval_seconds = 0 if show else log_interval_seconds
        self._total_bytes, self._done_bytes = total_bytes, done_bytes
        self.read_bytes = 0
        self._tokens = 0
        self._bar = _made_bar() if show else None
        if self._bar is not None:
            self._bar.add_task("preprocess", total=max(1, total_bytes), completed=done_bytes, rates="")

    def print(self, *lines: str) -> None:
        """Above the bar."""
        for line in lines:
            if self._bar is None:
                say(line, error=True)
            else:
                self._bar.console.print(line, soft_wrap=True)

    def update(self, read_bytes: int, tokens: int) -> None:
        """So much more was read and made."""
        self.read_bytes += read_bytes
        self._tokens += tokens
        now = time.perf_counter()
        seconds = max(1e-9, now - self._started)
        rates = f"{self.read_bytes / 1e6 / seconds:.1f} MB/s {self._tokens / seconds:,.0f} tokens/s"
        read = self._done_bytes + self.read_bytes
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=read, rates=rates)
        elif self._log_interval_seconds and now - self._logged >= self._log_interval_seconds:
            self._logged = now
            left = (self._total_bytes - read) / max(1, self.read_bytes) * seconds
            share = read / max(1, self._total_bytes)
            say(f"preprocess {share:.1%} {rates}, {max(0, left):.0f} s left", error=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _made_bar() -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from illada_megatron.system.console import made_console

    return Progress(
        TextColumn("preprocess"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[rates]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=made_console(stderr=True),
    )

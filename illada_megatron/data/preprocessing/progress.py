"""A bar over the input's bytes with the rates that matter: how fast text goes in, how fast tokens come out."""

import time

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from illada_megatron.system.terminal import made_console


class ProgressBar:
    """Of all workers together. show None: where stderr is a terminal. log_interval_seconds: where there is no bar, a
    line on stderr that often (0: none), for a batch system's log."""

    def __init__(self, total_bytes: int, done_bytes: int, show: bool | None, log_interval_seconds: float) -> None:
        self._console = made_console(stderr=True)
        show = self._console.is_terminal if show is None else show
        self._started = self._logged = time.perf_counter()
        self._log_interval_seconds = 0 if show else log_interval_seconds
        self._total_bytes, self._done_bytes = total_bytes, done_bytes
        self.read_bytes = 0
        self._tokens = 0
        self._progress = Progress(
            TextColumn("preprocess"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[rates]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not show,
        )
        self._task = self._progress.add_task("preprocess", total=max(1, total_bytes), completed=done_bytes, rates="")

    def print(self, *lines: str) -> None:
        """Above the bar."""
        for line in lines:
            self._console.print(line, soft_wrap=True)

    def update(self, read_bytes: int, tokens: int) -> None:
        """So much more was read and made."""
        self.read_bytes += read_bytes
        self._tokens += tokens
        now = time.perf_counter()
        seconds = max(1e-9, now - self._started)
        rates = f"{self.read_bytes / 1e6 / seconds:.1f} MB/s {self._tokens / seconds:,.0f} tokens/s"
        self._progress.update(self._task, completed=self._done_bytes + self.read_bytes, rates=rates)
        if self._log_interval_seconds and now - self._logged >= self._log_interval_seconds:
            self._logged = now
            read = self._done_bytes + self.read_bytes
            left = (self._total_bytes - read) / max(1, self.read_bytes) * seconds
            share = read / max(1, self._total_bytes)
            self._console.print(f"preprocess {share:.1%} {rates}, {max(0, left):.0f} s left")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

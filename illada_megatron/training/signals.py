"""Stopping in order: SIGTERM and SIGINT let the step end, save, and leave with 0."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Context in which the signals only raise a flag. A later one acts as usual, for whoever cannot wait."""

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)
    # A terminal and a launcher may both deliver one Ctrl-C.
    _SAME_SIGNAL_SECONDS = 3.0

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal that came."""
        self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._received_at > self._SAME_SIGNAL_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

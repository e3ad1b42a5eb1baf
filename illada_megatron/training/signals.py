"""Stopping in order: SIGTERM, SIGINT and SIGUSR1 let the step end, save, and leave with 0."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Context in which the signals only raise a flag. A second SIGTERM or SIGINT acts as usual, for the impatient.

    SIGUSR1 is Slurm's warning before the time limit (`--signal=USR1@SECONDS`), however often it comes; the SIGTERM at
    the limit itself is then the first, and a save that is being written may use the seconds until SIGKILL.
    """

    _WARNING = signal.SIGUSR1
    _SIGNALS = (signal.SIGTERM, signal.SIGINT, _WARNING)
    # A terminal and a launcher may both deliver one Ctrl-C.
    _SAME_SIGNAL_SECONDS = 3.0

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal that came."""
        self._received_at: float | None = None
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
            self.received = signal.Signals(number).name
        if number == self._WARNING:
            return
        if self._received_at is None:
            self._received_at = time.monotonic()
        elif time.monotonic() - self._received_at > self._SAME_SIGNAL_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

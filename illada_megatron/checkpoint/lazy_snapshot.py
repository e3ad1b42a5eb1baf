"""State that is written while the run goes on, without a copy for as long as nothing changes it.

Between two steps of the optimizer the weights and its moments are only read: the forward and the backward pass of the
next step are the time in which they can be written from where they live. What is left when the optimizer is ready is
copied, from the other end, while the writer goes on. (CheckFreq, FAST 2021, hides its copy behind them; this saves it.)
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from illada_megatron.checkpoint.sharded import Part


class Handover:
    """Parts between the run, which changes them at some time, and the one thread that iterates over them to write."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._live = deque(parts)
        self._copied: deque[Part] = deque()
        self._reading_live = self._copying = self._torn = False
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[Part]:
        """Every part once; a part that is live stays unchanged until the next one is asked for. Raises OSError where
        it could not (`secure`)."""
        try:
            while (part := self._take()) is not None:
                yield part
        finally:  # also where the writer gives up
            self.close()

    def close(self) -> None:
        """Nobody writes any more: nothing has to be copied, nobody has to wait, and no memory is kept."""
        with self._changed:
            self._live.clear()
            self._copied.clear()
            self._reading_live = False
            self._changed.notify_all()

    def secure(self, copy: Callable[[Part], Tensor], patience_seconds: float) -> None:
        """Return when nothing live is left to be written; the live parts may change from then on.

        Where the writer, last of all, does not come back from one part for so long, as on a file system that does not
        answer, the run goes on and what is written counts for nothing: the writer meets an OSError.
        """
        while True:
            with self._changed:
                if not self._live:
                    self._copying = False
                    self._changed.notify_all()
                    if not self._changed.wait_for(lambda: not self._reading_live, patience_seconds):
                        self._torn = True
                    return
                self._copying = True
                part = self._live.pop()
            kept = replace(part, tensor=copy(part))
            with self._changed:
                self._copied.append(kept)
                self._changed.notify_all()

    def _take(self) -> Part | None:
        with self._changed:
            if self._torn:
                raise OSError("a write did not end before the run had to go on: the files do not hold one state")
            self._reading_live = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._live or self._copied or not self._copying)
            if self._live:
                self._reading_live = True
                return self._live.popleft()
            return self._copied.popleft() if self._copied else None

"""A rank that makes no progress says where it is and leaves, so that the launcher can start the run again."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any

import torch

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: a later try may succeed."""
# The first step (kernels are compiled, communicators set up), validations and savings, over a step.
_OTHER_PHASES = 10
# If the interpreter itself hangs, no Python thread runs: after so much longer faulthandler's C thread ends the rank.
_GRACE_SECONDS = 30.0
_SHOWN_COLLECTIVES = 5


class Watchdog:
    """Context of the training loop, which says with `now` what it begins. seconds: faults.watchdog_seconds; None: this
    does nothing."""

    def __init__(self, seconds: float | None, rank: int) -> None:
        self._seconds = seconds
        self._rank = rank
        self._phase, self._step = "", 0
        self._since = self._limit = 0.0
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._watch, name="illada-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self.now("start", 0)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._seconds is None:
            return
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def now(self, phase: str, step: int) -> None:
        """The loop begins `phase` ("step" is a step after the first) of step `step`; the clock starts anew."""
        if self._seconds is None:
            return
        with self._changed:
            self._phase, self._step, self._since = phase, step, time.monotonic()
            self._limit = self._seconds * (1 if phase == "step" else _OTHER_PHASES)
            self._changed.notify()
        faulthandler.dump_traceback_later(self._limit + _GRACE_SECONDS, exit=True, file=2)

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                left = self._since + self._limit - time.monotonic()
                if left <= 0:
                    self._give_up()
                self._changed.wait(left)

    def _give_up(self) -> None:
        """Say what is known, the surest first, and end the process: nothing else would wake a hung collective."""
        _write(
            f"illada: watchdog: rank {self._rank} on {socket.gethostname()} (pid {os.getpid()}): step {self._step} "
            f"({self._phase}) has not ended after {time.monotonic() - self._since:.0f} s; the limit is "
            f"{self._limit:.0f} s (faults.watchdog_seconds). Stacks of all threads:\n"
        )
        faulthandler.dump_traceback(file=2, all_threads=True)
        try:
            text = last_collectives()
        except Exception as error:  # the stacks are out; whatever torch's recorder says, the rank has to end
            text = f"torch's flight recorder could not be read: {error!r}"
        _write(f"illada: watchdog: rank {self._rank}, its collectives, the newest last:\n{text}\n")
        sys.stdout.flush()
        os._exit(EXIT_CODE)


def last_collectives() -> str:
    """What torch's flight recorders know of this rank's collectives: those that have not finished, or else the last
    ones; a line each. A CUDA build has one for NCCL's and one for gloo's."""
    names = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    dumps = [dump for name in names if (dump := getattr(torch._C._distributed_c10d, name, None)) is not None]
    if not dumps:
        return "  this torch has no flight recorder"
    entries = [entry for dump in dumps for entry in json.loads(dump()).get("entries", [])]
    if not entries:
        return "  torch's flight recorder has none (TORCH_FR_BUFFER_SIZE has to be above 0 at the start)"
    entries.sort(key=lambda entry: entry["time_created_ns"])
    unfinished = [entry for entry in entries if not entry["retired"]]
    return "\n".join(_line(entry) for entry in (unfinished or entries)[-_SHOWN_COLLECTIVES:])


def _line(entry: dict[str, Any]) -> str:
    name, description = entry["process_group"]
    ago = time.time() - entry["time_created_ns"] / 1e9
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    shapes = ", ".join(str(size) for size in entry["input_sizes"])
    return (
        f"  {entry['profiling_name']} number {number} of group {name} ({description}), input {shapes} "
        f"{', '.join(entry['input_dtypes'])}, begun {ago:.1f} s ago, "
        f"{'finished' if entry['retired'] else 'not finished'}"
    )


def _write(text: str) -> None:
    """Straight to the file: another thread may hold sys.stderr's lock."""
    os.write(2, text.encode())

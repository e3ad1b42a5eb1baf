"""A rank that makes no progress says where it is and leaves, so that the launcher can start the run again."""

import faulthandler
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: a later try may succeed."""
# By the run's own times: over the longest of the last ones, which is long already where a save made it wait. Shorter
# limits would only take a slow disk or a neighbour on the network for a hang, and cost a restart of all ranks.
_TIMES_LONGEST = 10
_MEASURED = 100
LEAST_SECONDS = 300.0
UNMEASURED_SECONDS = 3600.0
"""What comes once, or has not been measured yet: process groups are made, kernels are compiled, checkpoints move."""
# By the configuration's number for a step: all other phases, over it.
_OTHER_PHASES = 10
# A process that is stopped for a while (Ctrl-Z, a frozen virtual machine) does not hang: a thread that looks this often
# and finds that much more gone has stood still itself.
_TICK_SECONDS = 1.0
_WAIT_FOR_SAVES = ("saving", "rollback", "end")
# If the interpreter itself hangs, no Python thread runs: after so much longer faulthandler's C thread ends the rank. It
# cannot tell that from being stopped.
_GRACE_SECONDS = 3600.0
# For what the rank has to say before it ends.
_LAST_WORD_SECONDS = 30.0
_SHOWN_COLLECTIVES = 5


class Watchdog:
    """Context of a whole run, which says with `now` what it begins: "start", "first step", "step", "validation",
    "saving", "rollback", "end". seconds: faults.watchdog_seconds; None: this does nothing. save_seconds: how long a
    save may take by its own limit, which is to be heard first. traces: a folder that gets what it says too."""

    def __init__(
        self,
        seconds: float | Literal["auto"] | None,
        rank: int,
        save_seconds: float = 0.0,
        traces: Path | None = None,
    ) -> None:
        self._seconds, self._traces = seconds, traces
        self._rank = rank
        # a save has its limit, and what is deleted behind it the same again (checkpoint/writing.py)
        self._save_seconds = 2 * save_seconds + LEAST_SECONDS if save_seconds else 0.0
        self._phase, self._step = "", 0
        self._lengths = {phase: deque[float](maxlen=_MEASURED) for phase in ("step", "validation")}
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
            if self._phase in self._lengths:
                self._lengths[self._phase].append(time.monotonic() - self._since)
            self._phase, self._step, self._since = phase, step, time.monotonic()
            self._limit = self.limit(phase)
            self._changed.notify()
        faulthandler.dump_traceback_later(self._limit + _GRACE_SECONDS, exit=True, file=2)

    def limit(self, phase: str) -> float:
        """How long `phase` may take now (s)."""
        assert self._seconds is not None
        if self._seconds == "auto":
            if lengths := self._lengths.get(phase):
                return max(LEAST_SECONDS, _TIMES_LONGEST * max(lengths))
            if phase == "end" and self._save_seconds:  # a save is the longest that it waits for
                return self._save_seconds
            return max(UNMEASURED_SECONDS, self._save_seconds if phase in _WAIT_FOR_SAVES else 0.0)
        if phase == "step":
            return self._seconds
        # the number is of a step; how long a checkpoint takes to load or to save has nothing to do with it
        at_least = UNMEASURED_SECONDS if phase == "start" else self._save_seconds if phase in _WAIT_FOR_SAVES else 0.0
        return max(_OTHER_PHASES * self._seconds, at_least)

    @contextmanager
    def last_phase(self, phase: str) -> Iterator[None]:
        """Whatever ends the block, what follows it is `phase`: it waits for a save that is under way, and for peers."""
        try:
            yield
        finally:
            self.now(phase, self._step)

    def _watch(self) -> None:
        with self._changed:
            looked = time.monotonic()
            while not self._ended:
                now = time.monotonic()
                if now - looked > 2 * _TICK_SECONDS:
                    self._since = min(now, self._since + now - looked)
                looked = now
                left = self._since + self._limit - now
                if left <= 0:
                    self._give_up()
                self._changed.wait(min(left, _TICK_SECONDS))

    def _give_up(self) -> None:
        """Say what is known, the surest first, and end the process: nothing else would wake a hung collective."""
        last = threading.Timer(_LAST_WORD_SECONDS, os._exit, (EXIT_CODE,))  # whoever should read this may hang as well
        last.daemon = True
        last.start()
        said = (
            f"illada: watchdog: rank {self._rank} on {socket.gethostname()} (pid {os.getpid()}): step {self._step} "
            f"({self._phase}) has not ended after {time.monotonic() - self._since:.0f} s; the limit is "
            f"{self._limit:.0f} s (faults.watchdog_seconds {self._seconds}). Stacks of all threads:\n"
        )
        _write(said)
        faulthandler.dump_traceback(file=2, all_threads=True)
        try:
            text = last_collectives()
        except Exception as error:  # the stacks are out; whatever torch's recorder says, the rank has to end
            text = f"torch's flight recorder could not be read: {error!r}"
        collectives = f"illada: watchdog: rank {self._rank}, its collectives, the newest last:\n{text}\n"
        _write(collectives)
        if self._traces is not None:
            name = f"rank_{self._rank:05d}_step_{self._step}"
            with suppress(Exception):  # it is said already
                self._traces.mkdir(parents=True, exist_ok=True)
                with (self._traces / f"{name}.txt").open("w") as file:
                    file.write(f"{said}\n")
                    file.flush()  # what follows writes past its buffer
                    faulthandler.dump_traceback(file=file, all_threads=True)
                    file.write(f"{collectives}\n")
                    file.flush()
                # those of all ranks together tell who did not come
                (self._traces / f"{name}.json").write_text(json.dumps(recorded_collectives()))
        os._exit(EXIT_CODE)


def recorded_collectives() -> list[dict[str, Any]] | None:
    """What torch's flight recorders know of this rank's collectives, the newest last; None: there is none. A CUDA build
    has one for NCCL's and one for gloo's."""
    names = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    dumps = [dump for name in names if (dump := getattr(torch._C._distributed_c10d, name, None)) is not None]
    if not dumps:
        return None
    entries = [entry for dump in dumps for entry in json.loads(dump()).get("entries", [])]
    return sorted(entries, key=lambda entry: entry["time_created_ns"])


def last_collectives() -> str:
    """Those that have not finished, or else the last ones; a line each."""
    entries = recorded_collectives()
    if entries is None:
        return "  this torch has no flight recorder"
    if not entries:
        return "  torch's flight recorder has none (TORCH_FR_BUFFER_SIZE has to be above 0 at the start)"
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
    """Straight to the file: another thread may hold sys.stderr's lock. Where it is full or closed, the rank ends
    without a word."""
    with suppress(OSError):
        os.write(2, text.encode())

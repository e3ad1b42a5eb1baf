"""Who writes into a save_dir: a file there names the attempt that does, and gives a sign of its life again and again.

A newer attempt of the same run takes over at once: it cannot ask a dead one for leave. Another run, started on the same
save_dir by mistake, waits for a sign of life, and is refused where one comes. The attempt that was there before, a rank
0 that was cut off and is back, sees another's name before it deletes or finishes anything, and ends. Files of tensors
have the attempt in their names (`TensorWriter`), so that other ranks that come back write over nothing.

Between the look and the deed another may take over; the two follow each other at once.
"""

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from illada_megatron.checkpoint.files.agreement import of_first
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.patience import patiently
from illada_megatron.checkpoint.files.storage import Folder, folder
from illada_megatron.checkpoint.store import seen_by_any
from illada_megatron.system import process

OWNER = "owner.json"
_RUN = "ILLADA_RUN"  # the launcher's (runtime/agent.py), where the user gave the run no name
SIGN_SECONDS, SILENT_SECONDS = 30.0, 120.0
"""Between two signs of life; how long one without a sign is waited for."""
_LOOK_SECONDS = 1.0
_LAST_SIGN_SECONDS = 5.0


# by the files of an earlier version
_LACKED_BEFORE = {"machine": "", "started": ""}


@dataclass(frozen=True)
class Owner:
    """An attempt to do a run."""

    attempt: str
    """Its own name, of no other."""
    run: str
    """What the launcher calls the run, over all attempts; empty: nothing that tells it from others."""
    host: str
    machine: str
    """As `process.machine` has it, and the next two, of rank 0."""
    pid: int
    started: str
    begun: str
    """UTC."""
    signs: int = 0
    """Of life, so far: compared with an earlier look at it and with no clock."""
    ended: bool = False
    """It has said that it writes nothing any more."""


class TakenOverError(CheckpointError):
    """Another attempt owns the save_dir."""

    def __init__(self, message: str, same_run: bool) -> None:
        super().__init__(message)
        self.same_run = same_run
        """It is one of the same run: the launcher has started it instead of this one."""


@contextmanager
def owned(save_dir: str | None, tell: Callable[[str], None]) -> Iterator["Ownership | None"]:
    """This attempt's ownership of `save_dir`; None: nothing is saved. Every rank enters it, before it reads what is
    there. Raises CheckpointError where another run is at work there, OSError where rank 0 does not see it, but others.
    """
    if save_dir is None:
        yield None
        return
    place = folder(save_dir)
    seen_by_any(place)
    ownership = Ownership(place, of_first(_new_owner), tell)
    of_first(ownership.take)
    try:
        yield ownership
    finally:
        ownership.end()


def _new_owner() -> Owner:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    return Owner(secrets.token_hex(4), _run(), platform.node(), process.machine(), pid, process.started(pid) or "", now)


class Ownership:
    """Of a save_dir. `place` and `owner` are every rank's, all else is rank 0's."""

    def __init__(self, place: Folder, owner: Owner, tell: Callable[[str], None]) -> None:
        """tell: hears for what the run waits."""
        self.place, self.owner, self._tell = place, owner, tell
        self._taken = False
        self._over = threading.Event()
        self._life = threading.Thread(target=self._give_signs, name="save-dir-owner", daemon=True)

    def take(self) -> None:
        """Become the owner, where the place is there and its disk answers; else `require` does it. Raises
        CheckpointError where another run is, and alive."""
        with suppress(OSError):
            if patiently(self.place.exists):
                self._follow()
        self._life.start()

    def require(self) -> None:
        """Raises TakenOverError where the place has another owner by now; OSError. A file that somebody has cleared
        away is written again."""
        if not self._taken:
            self._follow()
            return
        content = patiently(self._content)
        if content is None:
            patiently(self._write)
        elif (found := _parsed(content)) is None:
            raise OSError(f"{self.place}/{OWNER}: names no owner: remove it if no other run uses {self.place}")
        elif found.attempt != self.owner.attempt:
            raise _taken_over(self.place, self.owner, found)

    def end(self) -> None:
        """Say that this attempt writes nothing any more: who comes next need not wait."""
        self._over.set()
        if self._life.is_alive():  # on rank 0
            self._life.join(_LAST_SIGN_SECONDS)  # nobody waits for a disk that does not answer

    def _follow(self) -> None:
        """Write the file, after a look at who is named there. Raises CheckpointError as `take`, OSError."""
        content = patiently(self._content)
        if content is not None and not self._may_follow(_parsed(content)):
            self._wait_for_silence(content)
        patiently(self._write)

    def _may_follow(self, found: Owner | None) -> bool:
        if found is None:  # a power loss has left that, or a later version of this program writes so
            return False
        same_run = bool(self.owner.run) and found.run == self.owner.run
        here = found.machine != "" and found.machine == self.owner.machine
        earlier = here and found.pid == self.owner.pid  # of this very process
        return same_run or found.ended or earlier or process.has_ended(found.machine, found.pid, found.started)

    def _wait_for_silence(self, first: bytes) -> None:
        """Where the owner is alive, it may be about to end."""
        self._tell(
            f"{self.place}: another run saves there ({_shown(_parsed(first))}) and has not said that it has ended: "
            f"waiting {SILENT_SECONDS:.0f} s for a sign of its life, or its end"
        )
        until = time.monotonic() + SILENT_SECONDS
        content: bytes | None = first
        while time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
            content = patiently(self._content)
            if content is None or ((found := _parsed(content)) is not None and found.ended):
                return
        if content is not None and content != first:
            raise CheckpointError(
                f"{self.place}: another run is saving there ({_shown(_parsed(content))}): give each run a "
                "checkpoint.save_dir of its own, or stop that one first"
            )

    def _give_signs(self) -> None:
        signs, over = 0, False
        while not over:
            over = self._over.wait(SIGN_SECONDS)
            signs += 1
            if self._taken:
                try:
                    self.require()
                    self._write(signs=signs, ended=over)
                except OSError:
                    continue  # the saves say so, if it stays
                except TakenOverError:
                    return

    def _content(self) -> bytes | None:
        """Of the file; None: there is none. Raises OSError."""
        try:
            return self.place.read(OWNER)
        except FileNotFoundError:
            return None

    def _write(self, **changes: bool | int) -> None:
        self.place.make()
        self.place.replace(OWNER, json.dumps(asdict(replace(self.owner, **changes)), indent=1).encode())  # type: ignore[arg-type]
        self._taken = True


def _taken_over(place: Folder, owner: Owner, found: Owner) -> TakenOverError:
    same_run = bool(owner.run) and found.run == owner.run
    who = "a newer attempt of this run" if same_run else "another run"
    return TakenOverError(
        f"{place}: {who} has taken it over ({_shown(found)}); this one (attempt {owner.attempt}, begun {owner.begun}) "
        "saves nothing there any more, and ends"
        + ("" if same_run else ": give each run a checkpoint.save_dir of its own"),
        same_run,
    )


def _parsed(content: bytes) -> Owner | None:
    """Who the file names, whatever else it says; None: nobody."""
    try:
        found = json.loads(content)
        known = {name: found[name] for name in Owner.__dataclass_fields__ if name in found}
        return Owner(**(_LACKED_BEFORE | known))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _shown(owner: Owner | None) -> str:
    if owner is None:
        return "of which the file does not say what this program knows"
    return f"attempt {owner.attempt}, on {owner.host}, process {owner.pid}, begun {owner.begun}"


def _run() -> str:
    launched = os.environ.get(_RUN) or os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if launched != "none":  # what torchrun calls every run that was not given a name
        return launched
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID", "")
    return f"slurm {job}.{step}" if job else ""

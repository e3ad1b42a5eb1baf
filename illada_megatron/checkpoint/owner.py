"""Who writes into a save_dir: a file there names the attempt that came last, and an earlier one leaves it alone.

A run that is started again cannot ask a dead one for leave, so whoever comes takes over. The one that was there before,
a run started on the same save_dir by mistake or a rank 0 that was cut off and is back, sees another's name before it
deletes or finishes anything, and ends. Files of tensors have the attempt in their names (`TensorWriter`), so that other
ranks that come back write over nothing.

Between the look and the deed another may take over; the two follow each other at once.
"""

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.patience import patiently
from illada_megatron.checkpoint.files.storage import Folder

OWNER = "owner.json"


@dataclass(frozen=True)
class Owner:
    """An attempt to do a run."""

    attempt: str
    """Its own name, of no other."""
    run: str
    """What the launcher calls the run, over all attempts; empty: nothing that tells it from others."""
    host: str
    pid: int
    """Of rank 0."""
    begun: str
    """UTC."""


class TakenOverError(CheckpointError):
    """Another attempt owns the save_dir."""

    def __init__(self, message: str, same_run: bool) -> None:
        super().__init__(message)
        self.same_run = same_run
        """It is one of the same run: the launcher has started it instead of this one."""


def new_owner() -> Owner:
    """Of this process's attempt."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Owner(secrets.token_hex(4), _run(), socket.gethostname(), os.getpid(), now)


class Ownership:
    """Of a save_dir, as rank 0 holds it."""

    def __init__(self, place: Folder, owner: Owner) -> None:
        self.owner = owner
        self._place = place
        self._taken = False

    def take(self) -> None:
        """Make `owner` the owner. Raises OSError; then `require` does it, as soon as it can be done."""
        patiently(lambda: _write(self._place, self.owner))
        self._taken = True

    def require(self) -> None:
        """Raises TakenOverError where the place has another owner by now; OSError. A file that somebody has cleared
        away is written again."""
        if not self._taken:
            self.take()
            return
        try:
            content = patiently(lambda: self._place.read(OWNER))
        except FileNotFoundError:
            self.take()
            return
        try:
            found = Owner(**json.loads(content))
        except (ValueError, TypeError, RecursionError) as error:
            raise OSError(
                f"{self._place}/{OWNER}: names no owner: {error}: remove it if no other run uses {self._place}"
            ) from error
        if found.attempt != self.owner.attempt:
            raise _taken_over(self._place, self.owner, found)


def _taken_over(place: Folder, owner: Owner, found: Owner) -> TakenOverError:
    same_run = bool(owner.run) and found.run == owner.run
    who = "a newer attempt of this run" if same_run else "another run"
    return TakenOverError(
        f"{place}: {who} has taken it over (attempt {found.attempt}, on {found.host}, process {found.pid}, begun "
        f"{found.begun}); this one (attempt {owner.attempt}, begun {owner.begun}) saves nothing there any more, and "
        "ends" + ("" if same_run else ": give each run a checkpoint.save_dir of its own"),
        same_run,
    )


def _write(place: Folder, owner: Owner) -> None:
    place.make()
    place.replace(OWNER, json.dumps(asdict(owner), indent=1).encode())


def _run() -> str:
    launched, job = os.environ.get("TORCHELASTIC_RUN_ID", "none"), os.environ.get("SLURM_JOB_ID")
    if launched != "none":  # what torchrun calls every run that was not given a name
        return launched
    return f"slurm {job}" if job else ""

"""Faults of the file system in real processes: fail, cut short, delay, hang or kill at a chosen call of a chosen rank.

    faults = Injection(tmp_path / "faults", root=tmp_path / "run")
    faults.arm(Fault("fsync", "step_*/__1_0.distcp", rank=1, nth=2, error=errno.EIO))
    subprocess.run(command, env={**os.environ, **faults.environment})
    faults.arm()                    # none any more; processes that hang at one go on

`interpose.c` is preloaded into the processes and says what it sees and what it cannot. It is compiled at first use. The
faults are in a file that all processes map: they can be changed while processes run, and count calls over all of them,
also over a process's restart. `journal()` lists the calls below `root`, which is how a test finds all places where a
fault can strike; `power_loss.py` makes of it what a power loss leaves.
"""

import ctypes
import errno
import functools
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

_SOURCE = Path(__file__).parent / "interpose.c"
_FLAGS = ("-std=gnu11", "-O1", "-shared", "-fPIC", "-fno-delete-null-pointer-checks", "-Wall", "-Wextra")
_UNWANTED = ("-Wno-missing-attributes", "-Wno-nonnull", "-Wno-unused-parameter")
_FAULTS = 16
_ALWAYS = (1 << 63) - 1

Action = Literal["fail", "fail_after", "short", "delay", "hang", "freeze", "kill", "stop"]
_ACTIONS = ("fail", "fail_after", "short", "delay", "hang", "freeze", "kill", "stop")
# what changes something on the disk, and what makes it stay there
WRITING = frozenset(
    {"write", "fsync", "rename", "unlink", "rmdir", "mkdir", "truncate", "fallocate", "copy_file_range"}
)


@dataclass(frozen=True)
class Fault:
    """What is to happen at the calls that match."""

    calls: str = ""
    """Names as the journal has them, with spaces between: "open write"; "": every call."""
    path: str = "*"
    """fnmatch's pattern of the path below the root; `*` matches slashes, too. For rename either of its two."""
    action: Action = "fail"
    """fail: the call is not made, and answers `error`. fail_after: made, and answers `error` all the same, as when a
    server's answer is lost. short: at most `argument` bytes are read or written. delay: by `argument` milliseconds.
    hang: until `arm` is called again. freeze: this call and all later ones below the root hang so. kill, stop:
    SIGKILL, SIGSTOP to the process, before the call."""
    rank: int | None = None
    """RANK of the process; None: any."""
    nth: int = 1
    """The first matching call that it strikes, from 1."""
    times: int | None = 1
    """How many it strikes; None: all from the nth on."""
    error: int = errno.EIO
    argument: int = 0


@dataclass(frozen=True)
class Call:
    """A line of the journal."""

    name: str
    path: str
    """Below the root; "." is the root itself."""
    other: str | None
    """rename's second path."""
    rank: int | None
    pid: int
    result: int
    error: int
    injected: bool
    """A fault struck it."""
    inode: int
    offset: int
    """Of a write and a truncation."""
    created: bool
    truncated: bool
    time_ns: int
    data: bytes = field(repr=False)
    """What was written, where the journal has it."""


class _Fault(ctypes.Structure):
    _fields_ = [
        ("armed", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("first", ctypes.c_int64),
        ("last", ctypes.c_int64),
        ("argument", ctypes.c_int64),
        ("seen", ctypes.c_int64),
        ("fired", ctypes.c_int64),
        ("calls", ctypes.c_char * 256),
        ("path", ctypes.c_char * 512),
    ]


class _Control(ctypes.Structure):
    _fields_ = [
        ("root", ctypes.c_char * 4096),
        ("journal", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("faults", _Fault * _FAULTS),
    ]


# struct record of interpose.h
_RECORD = struct.Struct("<IIiiiiqqqQIIII")
_CREATED, _TRUNCATED = 1, 2


@functools.cache
def library() -> Path:
    """The compiled interposer, one for each version of its source."""
    if sys.platform != "linux":
        raise RuntimeError("faults are injected on Linux only")
    source = b"".join(path.read_bytes() for path in sorted(_SOURCE.parent.glob("interpose*")))
    name = f"illada-faults-{os.getuid()}-{sum(source) ^ len(source) << 16:x}.so"
    target = Path(tempfile.gettempdir()) / name
    if not target.exists():
        temporary = target.with_suffix(f".{os.getpid()}")
        compiler = shutil.which("cc") or "c++"
        subprocess.run([compiler, *_FLAGS, *_UNWANTED, "-o", temporary, _SOURCE, "-ldl"], check=True)
        temporary.replace(target)
    return target


class Injection:
    """The faults and the journal of the processes started with `environment`.

    shared: a new directory of its own, outside of `root`. root: the directory below which calls count, need not exist.
    """

    def __init__(self, shared: Path, root: Path, journal: Literal["no", "calls", "contents"] = "no") -> None:
        shared.mkdir(parents=True)
        self.shared, self.root = shared.resolve(), root.resolve()
        with (shared / "control").open("xb+") as file:
            file.truncate(ctypes.sizeof(_Control))
            self._map = mmap.mmap(file.fileno(), ctypes.sizeof(_Control))
        self._control = _Control.from_buffer(self._map)
        self._control.root = os.fsencode(self.root)
        self.keep(journal)
        self._journal = shared / "journal"
        self._first = 0  # of the half of the slots that is in use
        self._armed = 0

    @property
    def environment(self) -> dict[str, str]:
        """For processes that the faults are to strike."""
        return {"LD_PRELOAD": str(library()), "ILLADA_FAULTS": str(self.shared)}

    def arm(self, *faults: Fault) -> None:
        """From now on these and no others, all counts at 0; what hangs at an earlier one goes on, and meets these."""
        half = _FAULTS // 2
        assert len(faults) <= half
        self._first = half - self._first
        slots = self._control.faults[self._first : self._first + half]
        for slot, fault in zip(slots, faults, strict=False):
            slot.seen = slot.fired = 0
            slot.rank = -1 if fault.rank is None else fault.rank
            slot.action, slot.error = _ACTIONS.index(fault.action), fault.error
            slot.first = fault.nth
            slot.last = _ALWAYS if fault.times is None else fault.nth + fault.times - 1
            slot.argument = fault.argument
            slot.calls = f" {fault.calls} ".encode() if fault.calls else b""
            slot.path = os.fsencode(fault.path)
            self._armed += 1
            slot.armed = self._armed
        for slot in self._control.faults[half - self._first : 2 * half - self._first]:
            slot.armed = 0

    def fired(self, index: int = 0) -> int:
        """How many calls the fault of that number has struck."""
        return int(self._control.faults[self._first + index].fired)

    def wait_until_fired(self, alive: Callable[[], bool], index: int = 0) -> bool:
        """Return True when a fault has struck, False when nothing is `alive` any more."""
        while not self.fired(index):
            if not alive():
                return bool(self.fired(index))
            time.sleep(0.005)
        return True

    def keep(self, journal: Literal["no", "calls", "contents"]) -> None:
        """What the journal gets from now on."""
        self._control.journal = ("no", "calls", "contents").index(journal)

    def forget(self) -> None:
        """Begin the journal anew; no process may be writing to it."""
        if self._journal.exists():
            os.truncate(self._journal, 0)

    def journal(self) -> list[Call]:
        """The calls so far, in the order in which they ended."""
        return list(_calls(self._journal.read_bytes())) if self._journal.exists() else []


def _calls(content: bytes) -> Iterator[Call]:
    position = 0
    while position + _RECORD.size <= len(content):
        size, flags, rank, pid, error, injected, result, offset, now, inode, *lengths = _RECORD.unpack_from(
            content, position
        )
        parts, begin = [], position + _RECORD.size
        for length in lengths:
            parts.append(content[begin : begin + length])
            begin += length
        assert begin == position + size, "the journal is damaged"
        position = begin
        name, path, other, data = parts
        yield Call(
            name=name.decode(),
            path=os.fsdecode(path),
            other=os.fsdecode(other) if other else None,
            rank=rank if rank >= 0 else None,
            pid=pid,
            result=result,
            error=error,
            injected=bool(injected),
            inode=inode,
            offset=offset,
            created=bool(flags & _CREATED),
            truncated=bool(flags & _TRUNCATED),
            time_ns=now,
            data=data,
        )

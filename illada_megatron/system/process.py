"""Processes as others may ask for them later: whether one that left its name in a file is still there; and what this
one does with its memory."""

import ctypes
import gc
import os
import platform
from contextlib import suppress
from pathlib import Path

_ENDED = ("Z", "X")
_KEPT = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_TRIM_THRESHOLD_": (-1, 32 << 20),
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20),
}
"""Number of an option in glibc's malloc.h, and its value, by the name in the environment."""


def machine() -> str:
    """Where a number of a process means the same one: the host's name, what the kernel drew when it started (two
    machines may have one name) and the namespace of its numbers (containers on one machine may share both). "" where
    the system does not say: then nothing follows from numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (leads to no file)
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """When the process did, as the kernel counts: numbers are given again. "" where there is none, or only its exit
    status; None where this user is not told."""
    try:
        state, *fields = _stat(Path(f"/proc/{pid}"))
        # its first thread may have ended before one that is in the middle of a call, as for a file server
        ended = state in _ENDED and all(_stat(task)[0] in _ENDED for task in Path(f"/proc/{pid}/task").iterdir())
        return "" if ended else fields[18]
    except (OSError, ValueError, IndexError):
        pass
    with suppress(OSError, OverflowError):  # /proc may hide other users' processes
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
    return None


def _stat(of: Path) -> list[str]:
    """The fields of a process or thread from its state on (proc(5))."""
    return (of / "stat").read_text(errors="replace").rpartition(")")[2].split()


def has_ended(where: str, pid: int, since: str) -> bool:
    """Whether the process of number `pid`, which `started` `since` ("": not known) on the `machine` `where`, surely
    has."""
    if where == "" or where != machine() or pid <= 0:
        return False
    now = started(pid)
    return now == "" or (now is not None and since != "" and now != since)


def return_free_memory() -> None:
    """To the system: glibc keeps what a process has freed, some 10 MB to 100 MB, for as long as it lives."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_free_memory() -> None:
    """For one thread that makes and frees some MB again and again: what is free stays, in one place, instead of being
    given back and asked for again, page by page. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, (option, value) in _KEPT.items():
            if name not in os.environ:  # the user's own
                mallopt(option, value)


_searches: tuple[int, int, int] | None = None
"""Python's own thresholds, while others are set."""


def search_garbage_rarely() -> None:
    """Until `search_garbage_as_usual`, for a command that begins: to search what torch and megatron-core make when they
    are imported, of which nothing is garbage, is a sixth of a rank's start."""
    global _searches
    if _searches is None:
        _searches = gc.get_threshold()
        gc.set_threshold(20_000)


def search_garbage_as_usual() -> None:
    """Does nothing where nothing was changed."""
    global _searches
    if _searches is not None:
        gc.set_threshold(*_searches)
        _searches = None

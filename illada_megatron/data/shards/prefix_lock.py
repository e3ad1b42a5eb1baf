"""Who is at work under a prefix: PREFIX.lock, which is there from the first job on and is never removed, and
PREFIX.lock.json, which says who it is while somebody changes what is there.

A lock may hold on one machine only (Lustre's localflock, NFS's nolock, many FUSE file systems), and looks like any
other then. So whoever has it reads the note too. One of this machine whose process has ended is taken over at once. Any
other is watched: a job that lives touches its note every few seconds, whatever the clocks of the machines say."""

import errno
import fcntl
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.durable import name_once
from illada_megatron.system import process
from illada_megatron.system.terminal import say
from illada_megatron.system.whole_file import replaced, sync, temporary_suffix

# what file systems without locks answer
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_TOUCHED_SECONDS = 10.0
# a note that was not touched for so long is of a job that has ended: network file systems show a change up to 60 s late
_DEAD_SECONDS = 120.0
_LOOK_SECONDS = 0.5
NOTE_THREAD = "prefix lock"
"""Name of the thread that touches a note."""
_held: set[int] = set()
"""Descriptors: a copy of one, in a forked child, would hold the lock too."""


def lock_path(prefix: str) -> Path:
    return Path(prefix + ".lock")


class _Holder(BaseModel):
    """PREFIX.lock.json."""

    model_config = ConfigDict(frozen=True)
    host: str
    machine: str = ""
    """As `process.machine` has it, and the next two. An earlier version's note lacks it."""
    pid: int
    started: str = ""
    since: str
    token: str


class PrefixLock:
    """What `locked_prefix` gives. works: the file system has locks, or seems to."""

    def __init__(self, prefix: str, works: bool) -> None:
        self.works = works
        self._path = Path(prefix + ".lock.json")
        self._note = b""

    @property
    def is_noted(self) -> bool:
        """Somebody changes something under the prefix, or was stopped while he did."""
        return os.path.lexists(self._path)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within the block the prefix is this process's to change, on all machines. Without locks nothing is done.

        Raises DataError where another process lives; it takes up to two minutes to find out that one on another
        machine does not."""
        if not self.works:
            yield
            return
        self._write_note()
        ended = threading.Event()
        thread = threading.Thread(target=self._touch_until, args=(ended,), name=NOTE_THREAD, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if self.is_ours():
                self._path.unlink(missing_ok=True)
                sync(self._path.parent)  # after a power failure nobody has to wait for this process

    def is_ours(self) -> bool:
        """Whether the note is this process's still, which is touched then: for two minutes it stays so. False without
        locks."""
        if not self._note or _read(self._path)[0] != self._note:
            return False
        os.utime(self._path)
        return True

    def _touch_until(self, ended: threading.Event) -> None:
        while not ended.wait(_TOUCHED_SECONDS):
            with suppress(OSError):  # of a server that is away for a while
                self.is_ours()

    def _write_note(self) -> None:
        self._note = _note_of_this_process()
        while True:
            self._await_others()
            try:
                with replaced(self._path, name_once) as file:
                    file.write(self._note)
            except FileExistsError:
                continue
            except FileNotFoundError:  # another process was faster, and has removed what seemed to be left over
                if not self._path.parent.is_dir():
                    raise
            else:
                return

    def _await_others(self) -> None:
        """Return when there is no note."""
        found = _read(self._path)
        if not found[0]:
            return
        holder = _parsed(found[0], self._path)
        whose = f"process {holder.pid} on {holder.host}, which has been making this corpus since {holder.since}"
        deadline = time.monotonic() + _DEAD_SECONDS
        # the lock, which is ours, says so of this machine, unless it is none: then the process is there
        if not process.has_ended(holder.machine, holder.pid, holder.started):
            say(f"{self._path}: of {whose}: looking for up to {_DEAD_SECONDS:.0f} s whether it is alive", error=True)
        while not process.has_ended(holder.machine, holder.pid, holder.started) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            if (now := _read(self._path)) != found:
                if not now[0]:
                    return
                raise DataError(
                    f"{self._path}: {whose}, is at work (another process is making this corpus): wait for it or choose "
                    "another output prefix. To end it, stop that process: this file then goes, or is taken over after "
                    f"{_DEAD_SECONDS:.0f} s; if it is sure to be dead, you may remove this file yourself"
                )
        self._take_away(found[0])

    def _take_away(self, note: bytes) -> None:
        """Of several that have found it dead, one does; it may be another's note by now, which is put back."""
        taken = self._path.with_name(self._path.name + temporary_suffix())
        with suppress(FileNotFoundError):
            self._path.rename(taken)
            if _read(taken)[0] != note:
                with suppress(FileExistsError):
                    name_once(taken, self._path)
            taken.unlink(missing_ok=True)


@contextmanager
def locked_prefix(prefix: str) -> Iterator[PrefixLock]:
    """Hold the lock within the block: it ends with this process, however that ends. A file that is never removed can
    be locked before anything is known or written; one that comes and goes is now and then two files. Before anything
    is changed, `PrefixLock.noted` has to be entered: the lock may not hold on other machines.

    Where the file system has no locks (`works` is False), others may be at work, and what keeps them apart is that
    `durable.publish` replaces nothing. Raises DataError while another process has the lock, or where the file is none
    that this process may lock."""
    path = lock_path(prefix)
    descriptor = _opened(path)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{path}: another process is making this corpus; wait for it or choose another output prefix"
            ) from error
        except OSError as error:
            if error.errno == errno.EBADF:  # NFS locks only what may be written
                raise _unusable(path, "may not be written by this user") from error
            if error.errno not in _NO_LOCKS:
                error.filename = str(path)
                raise
            yield PrefixLock(prefix, works=False)
        else:
            yield PrefixLock(prefix, works=True)
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def release_locks() -> None:
    """In a child that was forked: its parent alone holds them then."""
    while _held:
        os.close(_held.pop())


def _opened(path: Path) -> int:
    """A colleague's lock may not be writable; most file systems lock it nevertheless."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except PermissionError:
            return os.open(path, os.O_RDONLY | flags)
    except PermissionError as error:
        raise _unusable(path, "may not be read by this user") from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DataError(f"{path}: is a link, expected a file or nothing: remove it") from error


def _unusable(path: Path, why: str) -> DataError:
    if not os.path.lexists(path):
        return DataError(f"{path}: this user may not write here: choose another output prefix")
    return DataError(
        f"{path}: {why}: let its owner do `chmod a+rw` on it, or remove it where no job of this prefix is at work, or "
        "choose another output prefix"
    )


def _read(path: Path) -> tuple[bytes, int]:
    """What is in a note, and when it was touched; nothing and 0 where there is none. It is opened for that: network
    file systems ask the server then."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return b"", 0
    except PermissionError as error:
        raise _unusable(path, "may not be read by this user") from error
    with os.fdopen(descriptor, "rb") as file:
        note, about = file.read(), os.fstat(descriptor)
    if len(note) < about.st_size:  # no note that is empty, which would be nobody's
        raise OSError(
            f"{path}: reading ended at byte {len(note)} of {about.st_size}: the disk has given less than it holds"
        )
    return note, about.st_mtime_ns


def _parsed(note: bytes, path: Path) -> _Holder:
    try:
        return _Holder.model_validate_json(note)
    except ValidationError as error:
        raise DataError(
            f"{path}: expected a note of who is making this corpus, found something else: remove it, or choose another "
            "output prefix"
        ) from error


def _note_of_this_process() -> bytes:
    pid = os.getpid()
    return (
        _Holder(
            host=platform.node(),
            machine=process.machine(),
            pid=pid,
            started=process.started(pid) or "",
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            token=secrets.token_hex(16),
        )
        .model_dump_json()
        .encode()
    )

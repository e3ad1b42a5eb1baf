"""A directory of a file system as a folder of checkpoints (`storage.Folder`)."""

import errno
import fcntl
import mmap
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from illada_megatron.system.whole_file import replaced, sync

# What stays in a core's cache on its way: between reading, checksum and writing nothing then goes through main memory.
_CACHED_BYTES = 1 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
_DIRECT_BYTES = 4 << 20


class LocalFolder:
    """A directory of a (possibly shared) file system."""

    block_bytes = _CACHED_BYTES

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> "LocalFolder":
        return LocalFolder(self.path.parent)

    def __truediv__(self, name: str) -> "LocalFolder":
        return LocalFolder(self.path / name)

    def exists(self) -> bool:
        return _is(stat.S_ISDIR, self.path) is not None

    def folders(self) -> list[str]:
        return sorted(path.name for path in self._entries() if path.is_dir())

    def files(self) -> list[str]:
        return sorted(path.name for path in self._entries() if path.is_file())

    def size(self, name: str) -> int | None:
        found = _is(stat.S_ISREG, self.path / name)
        return None if found is None else found.st_size

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        descriptor = os.open(self.path / name, os.O_RDONLY)
        try:
            while len(out):
                with _naming(self.path / name):
                    count = os.preadv(descriptor, [out], offset)
                if count == 0:
                    raise OSError(f"{self.path / name}: ends at byte {offset}, {len(out)} more were expected")
                offset, out = offset + count, out[count:]
        finally:
            os.close(descriptor)

    def create(self, name: str) -> "_LocalSink":
        return _LocalSink(self.path / name)

    def replace(self, name: str, content: bytes) -> None:
        with replaced(self.path / name) as file:
            file.write(content)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        sync(self.path.parent)

    def clear(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def _entries(self) -> list[Path]:
        return list(self.path.iterdir()) if self.exists() else []


def _is(kind: Callable[[int], bool], path: Path) -> os.stat_result | None:
    """The status of what is there and of that kind; an error that says nothing about that is raised, where pathlib's
    own questions may answer "no"."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if kind(found.st_mode) else None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of calls that take a descriptor do not say of which file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


class _LocalSink:
    """A file written past the page cache where the file system can: what is as large as a checkpoint would drive
    everything else out of it, and pages that are new to it cost more than the disk does."""

    def __init__(self, path: Path) -> None:
        try:
            descriptor = _open_new(path, _DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            descriptor = _open_new(path, 0)  # this file system cannot
        self._file = os.fdopen(descriptor, "wb", buffering=0)  # closes itself where nobody does, and twice
        self._path = path
        self._buffer = memoryview(mmap.mmap(-1, _DIRECT_BYTES))  # page-aligned, as the disk wants it
        self._filled = 0

    def write(self, block: Any) -> None:
        left = memoryview(block).cast("B")
        while len(left):
            part, left = left[: _DIRECT_BYTES - self._filled], left[_DIRECT_BYTES - self._filled :]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == _DIRECT_BYTES:
                self._flush()

    def close(self) -> None:
        self._through_cache()  # the end of the file is not as long as the disk's blocks
        self._flush()
        with _naming(self._path):
            os.fsync(self._file.fileno())
        self._file.close()
        sync(self._path.parent)

    def abandon(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        left = self._buffer[: self._filled]
        while len(left):  # a disk that is nearly full takes less than it is given
            try:
                written = os.write(self._file.fileno(), left)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._through_cache():
                    error.filename = str(self._path)
                    raise
                continue
            left = left[written:]
        self._filled = 0

    def _through_cache(self) -> bool:
        """From here on; whether it was otherwise."""
        flags = fcntl.fcntl(self._file.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)


def _open_new(path: Path, flags: int) -> int:
    """In place of what has the name. That is removed and not written into: a link would lead to another file."""
    path.unlink(missing_ok=True)
    return os.open(path, flags | os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

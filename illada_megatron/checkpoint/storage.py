"""Where checkpoints lie: a folder of a file system, or a prefix in object storage (`s3://bucket/run`, through obstore).

Both offer what checkpoints need and no more: files written once and durable when they are closed, small files replaced
as a whole, byte ranges read, folders listed and deleted. Credentials, region and endpoint of S3 come from the
environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; AWS_ALLOW_HTTP=true for an endpoint
without TLS). What fails raises OSError in both.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

_SCHEME = "s3://"
# An object's parts, and how many of them are on their way at a time: what a writer holds in memory.
_PART_BYTES = 16 << 20
_PARTS_ON_THEIR_WAY = 4
# What stays in a core's cache on its way: between reading, checksum and writing nothing then goes through main memory.
_CACHED_BYTES = 1 << 20
_DIRECT_BYTES = 4 << 20


class Sink(Protocol):
    """A file that is being written."""

    def write(self, block: Any) -> None:
        """Append bytes."""

    def close(self) -> None:
        """The file is durable and complete when this returns."""

    def abandon(self) -> None:
        """Leave what is there; it is never completed."""


class Folder(Protocol):
    """A directory, or the objects below a prefix."""

    @property
    def block_bytes(self) -> int:
        """What is best read, or written, at once."""

    @property
    def name(self) -> str:
        """Last part of its path."""

    @property
    def parent(self) -> "Folder": ...
    def __truediv__(self, name: str) -> "Folder": ...
    def exists(self) -> bool: ...
    def folders(self) -> list[str]:
        """Names of the folders in it; none where it does not exist."""

    def files(self) -> list[str]:
        """Names of the files in it; none where it does not exist."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: there is none of that name."""

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError, OSError."""

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with a file's bytes from `offset` on. Raises OSError, also where the file ends before."""

    def create(self, name: str) -> Sink:
        """A new file, in place of one of that name."""

    def replace(self, name: str, content: bytes) -> None:
        """Readers see the old content or the new, and the new is durable when this returns."""

    def make(self) -> None:
        """Create it, and the folders above it."""

    def clear(self) -> None:
        """Delete it with all that is in it; no error where it does not exist."""

    def remove(self, name: str) -> None:
        """Delete a file; no error where there is none."""


def folder(place: str | os.PathLike[str] | Folder) -> Folder:
    """The folder that a path or an `s3://` URL names."""
    if isinstance(place, str | os.PathLike):
        text = os.fspath(place)
        return ObjectFolder(text) if text.startswith(_SCHEME) else LocalFolder(Path(text))
    return place


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
        return self.path.is_dir()

    def folders(self) -> list[str]:
        return sorted(path.name for path in self._entries() if path.is_dir())

    def files(self) -> list[str]:
        return sorted(path.name for path in self._entries() if path.is_file())

    def size(self, name: str) -> int | None:
        file = self.path / name
        return file.stat().st_size if file.is_file() else None

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        descriptor = os.open(self.path / name, os.O_RDONLY)
        try:
            while len(out):
                count = os.preadv(descriptor, [out], offset)
                if count == 0:
                    raise OSError(f"{self.path / name}: ends at byte {offset}, {len(out)} more were expected")
                offset, out = offset + count, out[count:]
        finally:
            os.close(descriptor)

    def create(self, name: str) -> Sink:
        return _LocalSink(self.path / name)

    def replace(self, name: str, content: bytes) -> None:
        temporary = self.path / f"{name}.tmp"
        sink = _LocalSink(temporary)
        sink.write(content)
        sink.close()
        temporary.replace(self.path / name)
        sync(self.path)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        sync(self.path.parent)

    def clear(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def _entries(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []


class _LocalSink:
    """A file written past the page cache where the file system can: what is as large as a checkpoint would drive
    everything else out of it, and pages that are new to it cost more than the disk does."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            descriptor = os.open(path, flags, 0o666)  # this file system cannot
        self._file = os.fdopen(descriptor, "wb", buffering=0)  # closes itself where nobody does, and twice
        self._directory = path.parent
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
        os.fsync(self._file.fileno())
        self._file.close()
        sync(self._directory)

    def abandon(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        left = self._buffer[: self._filled]
        while len(left):  # a disk that is nearly full takes less than it is given
            try:
                written = os.write(self._file.fileno(), left)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._through_cache():
                    raise
                continue
            left = left[written:]
        self._filled = 0

    def _through_cache(self) -> bool:
        """From here on; whether it was otherwise."""
        flags = fcntl.fcntl(self._file.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)


def sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectFolder:
    """The objects below `s3://bucket/prefix`. An object is complete and durable when its upload has ended, and does not
    exist before; one request replaces it."""

    block_bytes = _PART_BYTES

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        bucket, _, self._prefix = self.url.removeprefix(_SCHEME).partition("/")
        self._bucket = bucket

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectFolder":
        return ObjectFolder(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> "ObjectFolder":
        return ObjectFolder(f"{self.url}/{name}")

    def exists(self) -> bool:
        found = self._listed()
        return bool(found["objects"] or found["common_prefixes"])

    def folders(self) -> list[str]:
        return sorted(str(prefix).rstrip("/").rpartition("/")[2] for prefix in self._listed()["common_prefixes"])

    def files(self) -> list[str]:
        return sorted(str(entry["path"]).rpartition("/")[2] for entry in self._listed()["objects"])

    def size(self, name: str) -> int | None:
        import obstore

        try:
            with self._errors(name):
                return int(obstore.head(self._store, self._key(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        import obstore

        with self._errors(name):
            return bytes(obstore.get(self._store, self._key(name)).bytes())

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        import obstore

        with self._errors(name):
            content = obstore.get_range(self._store, self._key(name), start=offset, length=len(out))
            if len(content) != len(out):
                raise OSError(f"{self}/{name}: ends at byte {offset + len(content)}, more was expected")
            out[:] = memoryview(content)

    def create(self, name: str) -> Sink:
        return _ObjectSink(self, name)

    def replace(self, name: str, content: bytes) -> None:
        import obstore

        with self._errors(name):
            obstore.put(self._store, self._key(name), content)

    def make(self) -> None:
        """Object storage has no folders."""

    def clear(self) -> None:
        import obstore

        with self._errors(""):
            for batch in obstore.list(self._store, prefix=f"{self._prefix}/"):
                obstore.delete(self._store, [entry["path"] for entry in batch])

    def remove(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._errors(name):
            obstore.delete(self._store, self._key(name))

    @property
    def _store(self) -> Any:
        return _bucket_store(self._bucket)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _listed(self) -> Any:
        import obstore

        with self._errors(""):
            return obstore.list_with_delimiter(self._store, prefix=self._prefix or None)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """obstore's errors as OSError, with the URL."""
        from obstore.exceptions import BaseError, NotFoundError

        where = f"{self}/{name}" if name else str(self)
        try:
            yield
        except (FileNotFoundError, NotFoundError) as error:
            raise FileNotFoundError(f"{where}: no such object") from error
        except BaseError as error:
            raise OSError(
                f"{where}: object storage failed ({type(error).__name__}: {str(error)[:300]}): check the URL, "
                "AWS_REGION, AWS_ENDPOINT_URL and the credentials"
            ) from error


class _ObjectSink:
    def __init__(self, place: ObjectFolder, name: str) -> None:
        import obstore

        self._place, self._name = place, name
        with place._errors(name):
            self._writer = obstore.open_writer(
                place._store, place._key(name), buffer_size=_PART_BYTES, max_concurrency=_PARTS_ON_THEIR_WAY
            )

    def write(self, block: Any) -> None:
        with self._place._errors(self._name):
            self._writer.write(block)

    def close(self) -> None:
        with self._place._errors(self._name):
            self._writer.close()

    def abandon(self) -> None:
        """Uploaded parts are the bucket's to expire: the client has no way to take them back."""


@lru_cache(maxsize=64)
def _bucket_store(bucket: str) -> Any:
    """One client a bucket and process; it is thread-safe and keeps its connections."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise OSError(f"s3://{bucket}: needs the package obstore: pip install 'illada-megatron[s3]'") from error
    return from_url(f"{_SCHEME}{bucket}")

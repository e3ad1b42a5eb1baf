"""Where checkpoints lie: a folder of a file system, or a prefix in object storage (`s3://bucket/run`).

Both offer what checkpoints need and no more: files written once and durable when they are closed, small files replaced
as a whole, byte ranges read, folders listed and deleted. What fails raises OSError in both.
"""

import os
from pathlib import Path
from typing import Any, Protocol

from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.object_storage import SCHEME, ObjectFolder


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
        return ObjectFolder(text) if text.startswith(SCHEME) else LocalFolder(Path(text))
    return place

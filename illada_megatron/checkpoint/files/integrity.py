"""Checksums of a checkpoint's files: made while they are written, compared before they are loaded."""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypedDict

import xxhash

from illada_megatron.checkpoint.files.patience import patiently
from illada_megatron.checkpoint.files.storage import Folder


class FileRecord(TypedDict):
    """A file as its writer meant it."""

    bytes: int
    xxh3_128: str


class RecordedFile:
    """A new file of `place` whose record is made of what is written to it. Raises OSError."""

    def __init__(self, place: Folder, name: str) -> None:
        self.name = name
        self.position = 0
        """Bytes written."""
        self._sink, self._block_bytes = place.create(name), place.block_bytes
        self._digest = xxhash.xxh3_128()

    def write(self, content: Any) -> None:
        """Append bytes, as many at a time as stay in a core's cache from the checksum to the file."""
        left = memoryview(content).cast("B")
        for start in range(0, len(left), self._block_bytes):
            block = left[start : start + self._block_bytes]
            self._sink.write(block)
            self._digest.update(block)
        self.position += len(left)

    def close(self) -> FileRecord:
        """Make it durable."""
        self._sink.close()
        return FileRecord(bytes=self.position, xxh3_128=self._digest.hexdigest())

    def abandon(self) -> None:
        """Give it up."""
        self._sink.abandon()


def damage(place: Folder, files: Mapping[str, FileRecord], checksums: bool) -> str | None:
    """What is wrong with these files of `place`, the first thing found; None: they are as they were written.

    checksums: their bytes are compared, else their sizes only. What cannot be read is no damage: raises OSError, after
    some tries.
    """
    for name in sorted(files):
        if (found := patiently(partial(_file_damage, place, name, files[name], checksums))) is not None:
            return found
    return None


def _file_damage(place: Folder, name: str, record: FileRecord, checksums: bool) -> str | None:
    if (size := place.size(name)) != record["bytes"]:
        state = "is missing" if size is None else f"has {size} bytes"
        return f"{place}/{name}: {state}, expected {record['bytes']} bytes"
    if checksums and (found := checksum(place, name, record["bytes"])) != (expected := record["xxh3_128"]):
        return f"{place}/{name}: its bytes have changed: checksum {found}, expected {expected}"
    return None


def checksum(place: Folder, name: str, nbytes: int) -> str:
    """XXH3-128 of a file of `nbytes`: an error check at memory speed, not a signature. Raises OSError."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(min(nbytes, place.block_bytes)))
    for start in range(0, nbytes, place.block_bytes):
        part = block[: nbytes - start]
        place.read_into(name, start, part)
        digest.update(part)
    return digest.hexdigest()

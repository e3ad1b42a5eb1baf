"""Sizes and checksums of a checkpoint's files, made and compared by all ranks together.

Each rank reads the files it has written, right after it has: they still lie in its page cache. On load the files are
divided among the ranks.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import xxhash

from illada_megatron.checkpoint.together import gathered, rank_and_size

RECORD = "checkpoint.json"
_BLOCK = 1 << 23


class FileRecord(TypedDict):
    """A file as it was written."""

    bytes: int
    xxh3_128: str


def seal(path: Path) -> dict[str, FileRecord]:
    """Make all files below `path` durable and describe them, by name. Every rank calls it, when all have written.

    The bytes are those that the file system gives back: what went wrong before, while they were written, is not seen.
    Raises OSError.
    """
    rank, _ = rank_and_size()
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != RECORD)
    written: dict[str, FileRecord] = {}
    for file in files:
        if _writer(file) == rank:
            sync(file)
            written[str(file.relative_to(path))] = FileRecord(bytes=file.stat().st_size, xxh3_128=_checksum(file))
    return dict(sorted((name, record) for part in gathered(written) for name, record in part.items()))


def damage(path: Path, files: Mapping[str, FileRecord], checksums: bool) -> str | None:
    """What is wrong with the files below `path`, the first thing found; None: they are as they were written.

    Sizes of all are compared; checksums, where asked for, of this rank's share. The caller asks the other ranks.
    """
    for name, record in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != record["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes"
            return f"{file}: {state}, expected {record['bytes']} bytes"
    if not checksums:
        return None
    rank, size = rank_and_size()
    for name in sorted(files)[rank::size]:
        found_checksum, expected = _checksum(path / name), files[name]["xxh3_128"]
        if found_checksum != expected:
            return f"{path / name}: its bytes have changed: checksum {found_checksum}, expected {expected}"
    return None


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _writer(file: Path) -> int:
    """The rank that wrote it: torch names data files __{rank}_{number}.distcp; rank 0 writes all others."""
    parts = file.name.split("_")
    named = file.suffix == ".distcp" and file.name.startswith("__") and parts[2].isdigit()
    rank = int(parts[2]) if named else 0
    return rank if rank < rank_and_size()[1] else 0


def _checksum(file: Path) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()

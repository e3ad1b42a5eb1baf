"""Whether a checkpoint's files are as they were written: compared by all ranks together, each its share."""

from collections.abc import Mapping
from typing import TypedDict

import xxhash

from illada_megatron.checkpoint.storage import Folder
from illada_megatron.checkpoint.together import rank_and_size


class FileRecord(TypedDict):
    """A file as its writer meant it."""

    bytes: int
    xxh3_128: str


def damage(place: Folder, files: Mapping[str, FileRecord], checksums: bool) -> str | None:
    """What is wrong with the files of `place`, the first thing found; None: they are as they were written.

    Sizes of all are compared; checksums, where asked for, of this rank's share. The caller asks the other ranks.
    """
    for name, record in files.items():
        found = place.size(name)
        if found != record["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes"
            return f"{place}/{name}: {state}, expected {record['bytes']} bytes"
    if not checksums:
        return None
    rank, size = rank_and_size()
    for name in sorted(files)[rank::size]:
        found_checksum, expected = checksum(place, name, files[name]["bytes"]), files[name]["xxh3_128"]
        if found_checksum != expected:
            return f"{place}/{name}: its bytes have changed: checksum {found_checksum}, expected {expected}"
    return None


def checksum(place: Folder, name: str, nbytes: int) -> str:
    """XXH3-128 of a file of `nbytes`: an error check at memory speed, not a signature. Raises OSError."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(min(nbytes, place.block_bytes)))
    for start in range(0, nbytes, place.block_bytes):
        part = block[: nbytes - start]
        place.read_into(name, start, part)
        digest.update(part)
    return digest.hexdigest()

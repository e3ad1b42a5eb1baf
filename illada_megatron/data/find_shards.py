"""Shards as tools are told about them: prefixes, globs, folders and manifests."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from illada_megatron.data.corpus import resolve_prefixes
from illada_megatron.data.errors import DataError
from illada_megatron.data.manifest import Manifest, ShardEntry, read_manifest


@dataclass(frozen=True)
class FoundShard:
    """A shard by its prefix and, where a manifest lists it, what that says."""

    prefix: str
    manifest: Manifest | None = None
    entry: ShardEntry | None = None


def find_shards(paths: Sequence[str | Path]) -> list[FoundShard]:
    """Shards, in order. An entry is a prefix, a glob of prefixes, a manifest (.json), or a folder, which means the
    shards in it by name. Whether the files are there is left to whoever opens them.

    Raises DataError when there is none, or one is listed twice."""
    found = [shard for path in paths for shard in _find(str(path))]
    if not found:
        raise DataError("no shards were given, expected prefixes, globs, folders or manifests")
    seen: dict[str, str] = {}
    for shard in found:
        other = seen.setdefault(os.path.realpath(shard.prefix), shard.prefix)
        if other is not shard.prefix:
            raise DataError(f"{shard.prefix}: this shard is listed twice (also as {other}), expected once")
    return found


def _find(path: str) -> Iterator[FoundShard]:
    if path.endswith(".json"):
        manifest = read_manifest(path)
        for entry in manifest.shards:
            if "://" in entry.path:
                raise DataError(f"{path}: lists {entry.path}, expected files: copy the shards to a file system")
            yield FoundShard(str(Path(path).parent / entry.path), manifest, entry)
    elif Path(path).is_dir() and not Path(f"{path}.idx").exists():
        prefixes = {str(file.with_suffix("")) for file in Path(path).iterdir() if file.suffix in (".bin", ".idx")}
        if not prefixes:
            raise DataError(f"{path}: no shard is in this folder, expected files *.bin and *.idx")
        yield from map(FoundShard, sorted(prefixes))
    else:
        yield from map(FoundShard, resolve_prefixes([path]))

"""From what a configuration names (prefixes, globs, manifests) to the list of shards that make up a corpus."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, parse_manifest, read_manifest
from illada_megatron.data.shards.remote import is_remote, read_object
from illada_megatron.data.shards.unfinished import require_finished

_GLOB_CHARACTERS = frozenset("*?[")
_MANIFEST_SUFFIX = ".json"


@dataclass(frozen=True)
class FoundShard:
    """A shard by its prefix and, where a manifest lists it, what that says. The files may not be there."""

    prefix: str
    manifest: Manifest | None = None
    entry: ShardEntry | None = None
    manifest_path: str | None = None


@dataclass(frozen=True)
class Shard:
    """`prefix`.bin and `prefix`.idx: `tokens` ids of `dtype`."""

    prefix: str
    dtype: str
    tokens: int


@dataclass(frozen=True)
class ShardList:
    """The shards of a corpus in order, and what its manifests say of the tokenizer."""

    shards: tuple[Shard, ...]
    manifests: dict[str, Manifest]
    """By path."""

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


def find_shards(paths: Sequence[str | Path]) -> list[FoundShard]:
    """The shards that `paths` name, in order. A path is a manifest (`*.json`, also `s3://…`), a prefix, a glob of
    prefixes, or a folder, which means the shards in it; what a glob or a folder holds is sorted by name (so number
    shards with leading zeros). No shard is opened.

    Raises DataError: no path, nothing matches, a shard listed twice, a manifest that cannot be used."""
    found = [shard for path in paths for shard in _find(str(path))]
    if not found:
        raise DataError(
            "no shards were given, expected at least one manifest, prefix, glob of prefixes or folder: set "
            "data.train_paths (data.validation_paths for validation)"
        )
    seen: dict[str, str] = {}
    for shard in found:
        other = seen.setdefault(_resolved(shard.prefix), shard.prefix)
        if other is not shard.prefix:
            also = f" (also as {other})" if other != shard.prefix else ""
            raise DataError(
                f"{shard.prefix}: this shard is listed 2 times{also}, expected once: two of the given paths overlap"
            )
    return found


def list_shards(paths: Sequence[str | Path]) -> ShardList:
    """The shards that `paths` name (see `find_shards`), with their sizes.

    A manifest is believed: no shard of it is opened here, so that thousands cost one small file. Of other shards the
    sizes and the ends of the index are read.

    Raises DataError: as `find_shards`, and for a shard that cannot be used."""
    found = find_shards(paths)
    manifests = {one.manifest_path: one.manifest for one in found if one.manifest_path and one.manifest}
    return ShardList(tuple(map(_sized, found)), manifests)


def require_disjoint(training: Sequence[Shard], validation: Sequence[Shard]) -> None:
    """Raise DataError when a shard is in both: held-out figures of trained text would look splendid."""
    places = {_identity(shard.prefix): shard.prefix for shard in training}
    for shard in validation:
        if (prefix := places.get(_identity(shard.prefix))) is not None:
            raise DataError(
                f"{shard.prefix}: this validation shard is the training shard {prefix}: give other shards in "
                "data.validation_paths, or leave it empty and set data.holdout_tokens"
            )


def _resolved(prefix: str) -> str:
    return prefix if is_remote(prefix) else os.path.realpath(prefix)


def _identity(prefix: str) -> str | tuple[int, int]:
    """The file itself, whatever it is called: links and relative paths do not hide it."""
    bin_path = Path(prefix + ".bin")
    if is_remote(prefix) or not bin_path.exists():
        return _resolved(prefix)
    status = bin_path.stat()
    return status.st_dev, status.st_ino


def _sized(found: FoundShard) -> Shard:
    if found.entry is not None:
        return Shard(found.prefix, found.entry.dtype, found.entry.tokens)
    dataset = IndexedDataset(found.prefix)
    return Shard(found.prefix, dataset.dtype.name, dataset.num_tokens)


def _find(path: str) -> Iterator[FoundShard]:
    if path.endswith(_MANIFEST_SUFFIX):
        manifest = parse_manifest(read_object(path), path) if is_remote(path) else read_manifest(path)
        folder = path.rpartition("/")[0]
        for entry in manifest.shards:
            yield FoundShard(_join(folder, entry.path), manifest, entry, path)
    elif is_remote(path):
        raise DataError(
            f"{path}: expected a manifest (…{_MANIFEST_SUFFIX}): shards in object storage are listed by one, so that "
            "opening a corpus asks for nothing else; give the manifest's URL in data.train_paths"
        )
    elif Path(path).is_dir() and not Path(f"{path}.idx").exists():
        prefixes = {str(file.with_suffix("")) for file in Path(path).iterdir() if file.suffix in (".bin", ".idx")}
        if not prefixes:
            raise DataError(f"{path}: no shard is in this folder, expected files *.bin and *.idx")
        require_finished(prefixes, path)
        yield from map(FoundShard, sorted(prefixes))
    else:
        yield from map(FoundShard, _expand(path))


def _join(folder: str, path: str) -> str:
    return path if is_remote(path) or path.startswith("/") or not folder else f"{folder}/{path}"


def _expand(pattern: str) -> list[str]:
    # a name that has brackets or stars in it and is there as such is meant as such
    if not _GLOB_CHARACTERS & set(pattern) or Path(pattern + ".idx").exists():
        return [pattern]
    anchor = Path(pattern).anchor
    relative = pattern[len(anchor) :]
    # a lone .bin is matched too: opening it then says that its index is missing instead of it being left out
    matches = sorted(
        {str(path)[: -len(suffix)] for suffix in (".bin", ".idx") for path in Path(anchor).glob(relative + suffix)}
    )
    if not matches:
        raise DataError(
            f"{pattern}: no shard matches this glob, expected files {pattern}.idx (current directory: {Path.cwd()})"
        )
    require_finished(matches, pattern)
    return matches

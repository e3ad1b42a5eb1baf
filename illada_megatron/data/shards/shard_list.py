"""From what a configuration names (prefixes, globs, manifests) to the list of shards that make up a corpus."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, parse_manifest, read_manifest
from illada_megatron.data.shards.remote import is_remote, read_object
from illada_megatron.data.shards.unfinished import require_finished

_GLOB_CHARACTERS = frozenset("*?[")
_MANIFEST_SUFFIX = ".json"


class TokenizerFacts(NamedTuple):
    """What a manifest says of the tokenizer that made its shards."""

    vocab_size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class FoundShard:
    """A shard by its prefix and, where a manifest lists it, what that says. The files may not be there."""

    prefix: str
    manifest: Manifest | None = None
    entry: ShardEntry | None = None
    manifest_path: str | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """`prefix`.bin and `prefix`.idx: `tokens` ids of `dtype`."""

    prefix: str
    dtype: str
    tokens: int
    checksum: str | None = None
    """XXH3-128 of its .bin where a manifest says it."""


@dataclass(frozen=True)
class ShardList:
    """The shards of a corpus in order, and what its manifests say of the tokenizer."""

    shards: tuple[Shard, ...]
    tokenizers: dict[str, TokenizerFacts]
    """By the path of the manifest."""

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
    resolved = _Resolver()
    for shard in found:
        place = resolved(shard.prefix)
        if (other := seen.get(place)) is not None:
            also = f" (also as {other})" if other != shard.prefix else ""
            raise DataError(
                f"{shard.prefix}: this shard is listed 2 times{also}, expected once: two of the given paths overlap"
            )
        seen[place] = shard.prefix
    return found


def list_shards(paths: Sequence[str | Path]) -> ShardList:
    """The shards that `paths` name (see `find_shards`), with their sizes.

    A manifest is believed: no shard of it is looked for here, so that a hundred thousand cost one file. Of other shards
    the sizes and the ends of the index are read.

    Raises DataError: as `find_shards`, and for a shard that cannot be used."""
    found = find_shards(paths)
    tokenizers = {
        one.manifest_path: TokenizerFacts(one.manifest.vocab_size, one.manifest.tokenizer_sha256)
        for one in found
        if one.manifest_path and one.manifest
    }
    return ShardList(tuple(map(_sized, found)), tokenizers)


class KnownShards:
    """Finds shards again, whatever they are called: the same file, or the same tokens.

    Files are looked for only where the lists do not tell: the same type and number of tokens, and no checksum of one of
    the two. What it takes does not grow with the number of known shards."""

    def __init__(self, shards: Iterable[Shard] = ()) -> None:
        self._by_checksum: dict[tuple[str, int, str], Shard] = {}
        # by type and number of tokens
        self._without_checksum: dict[tuple[str, int], _ByFile] = defaultdict(_ByFile)
        self._with_checksum: dict[tuple[str, int], _ByFile] = defaultdict(_ByFile)
        for shard in shards:
            self.add(shard)

    def add(self, shard: Shard) -> None:
        size = shard.dtype, shard.tokens
        if shard.checksum is None:
            self._without_checksum[size].add(shard)
        else:
            self._with_checksum[size].add(shard)
            self._by_checksum.setdefault((*size, shard.checksum), shard)

    def find(self, shard: Shard) -> Shard | None:
        """The known shard that is the same as this one."""
        size = shard.dtype, shard.tokens
        by_file = [self._without_checksum]
        if shard.checksum is None:
            by_file.append(self._with_checksum)
        elif (same := self._by_checksum.get((*size, shard.checksum))) is not None:
            return same
        return next((same for one in by_file if size in one and (same := one[size].find(shard)) is not None), None)


class _ByFile:
    """Shards by their files, which are looked for when one is asked for."""

    def __init__(self) -> None:
        self._known: dict[str | tuple[int, int], Shard] = {}
        self._new: list[Shard] = []

    def add(self, shard: Shard) -> None:
        self._new.append(shard)

    def find(self, shard: Shard) -> Shard | None:
        for one in self._new:
            self._known.setdefault(_identity(one.prefix), one)
        self._new.clear()
        return self._known.get(_identity(shard.prefix))


class _Resolver:
    """Prefixes without links and relative parts. A prefix is no file, and what leads to it is resolved once a folder:
    no call of the file system for each shard."""

    def __init__(self) -> None:
        self._folder = lru_cache(maxsize=None)(os.path.realpath)

    def __call__(self, prefix: str) -> str:
        if is_remote(prefix):
            return prefix
        folder, name = os.path.split(prefix)
        return f"{self._folder(folder)}/{name}" if name not in ("", ".", "..") else self._folder(prefix)


def _identity(prefix: str) -> str | tuple[int, int]:
    """The file itself, whatever it is called: links and relative paths do not hide it."""
    bin_path = Path(prefix + ".bin")
    if is_remote(prefix) or not bin_path.exists():
        return _Resolver()(prefix)
    status = bin_path.stat()
    return status.st_dev, status.st_ino


def _sized(found: FoundShard) -> Shard:
    if found.entry is not None:
        return Shard(found.prefix, found.entry.dtype, found.entry.tokens, found.entry.bin_xxh3_128)
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

"""From what a configuration names (prefixes, globs, manifests) to the list of shards that make up a corpus."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from illada_megatron.data.errors import DataError
from illada_megatron.data.indexed_dataset import IndexedDataset
from illada_megatron.data.manifest import Manifest, parse_manifest, read_manifest
from illada_megatron.data.remote import is_remote, read_object

_GLOB_CHARACTERS = frozenset("*?[")
_MANIFEST_SUFFIX = ".json"


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
    manifests: tuple[tuple[str, Manifest], ...]
    """(path, content) of each manifest."""

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


def list_shards(paths: Sequence[str | Path]) -> ShardList:
    """The shards that `paths` name, in order: manifests (`*.json`, also `s3://`), prefixes, globs of prefixes.

    A manifest is believed: no shard of it is opened here, so that thousands cost one small file. Of a prefix the
    sizes and the ends of its index are read.

    Raises DataError: no entry, nothing matches, a shard listed twice, a shard or manifest that cannot be used."""
    shards: list[Shard] = []
    manifests = []
    for path in _require_some(paths):
        if str(path).endswith(_MANIFEST_SUFFIX):
            manifest = _read_manifest(str(path))
            manifests.append((str(path), manifest))
            folder = str(path).rpartition("/")[0]
            shards += [Shard(_join(folder, one.path), one.dtype, one.tokens) for one in manifest.shards]
        elif is_remote(str(path)):
            raise DataError(
                f"{path}: expected a manifest (…{_MANIFEST_SUFFIX}): shards in object storage are listed by one, so "
                "that opening a corpus asks for nothing else; give the manifest's URL in data.train_paths"
            )
        else:
            shards += [_open(prefix) for prefix in _expand(str(path))]
    _refuse_twice([shard.prefix for shard in shards], paths)
    return ShardList(tuple(shards), tuple(manifests))


def resolve_prefixes(paths: Sequence[str | Path]) -> list[str]:
    """Prefixes of the shards that `paths` name, as `list_shards`; shards given by prefix or glob are not opened."""
    prefixes: list[str] = []
    for path in _require_some(paths):
        if str(path).endswith(_MANIFEST_SUFFIX):
            prefixes += [shard.prefix for shard in list_shards([path]).shards]
        else:
            prefixes += _expand(str(path))
    _refuse_twice(prefixes, paths)
    return prefixes


def require_disjoint(training: Sequence[Shard], validation: Sequence[Shard]) -> None:
    """Raise DataError when a shard is in both: held-out figures of trained text would look splendid."""
    places = {_identity(shard.prefix): shard.prefix for shard in training}
    for shard in validation:
        if (prefix := places.get(_identity(shard.prefix))) is not None:
            raise DataError(
                f"{shard.prefix}: this validation shard is the training shard {prefix}: give other shards in "
                "data.validation_paths, or leave it empty and set data.holdout_tokens"
            )


def _identity(prefix: str) -> str | tuple[int, int]:
    """The file itself, whatever it is called: links and relative paths do not hide it."""
    bin_path = Path(prefix + ".bin")
    if is_remote(prefix) or not bin_path.exists():
        return prefix
    status = bin_path.stat()
    return status.st_dev, status.st_ino


def _require_some(paths: Sequence[str | Path]) -> Sequence[str | Path]:
    if not paths:
        raise DataError(
            "no shards were given, expected at least one manifest, prefix or glob of prefixes: set data.train_paths "
            "(data.validation_paths for validation)"
        )
    return paths


def _refuse_twice(prefixes: Sequence[str], paths: Sequence[str | Path]) -> None:
    prefix, occurrences = Counter(prefixes).most_common(1)[0]
    if occurrences > 1:
        raise DataError(
            f"{prefix}: this shard is listed {occurrences} times in {[str(path) for path in paths]}, expected once: "
            "two entries of data.train_paths (or validation_paths) overlap"
        )


def _read_manifest(path: str) -> Manifest:
    return parse_manifest(read_object(path), path) if is_remote(path) else read_manifest(path)


def _join(folder: str, path: str) -> str:
    return path if is_remote(path) or path.startswith("/") or not folder else f"{folder}/{path}"


def _open(prefix: str) -> Shard:
    dataset = IndexedDataset(prefix)
    return Shard(prefix, dataset.dtype.name, dataset.num_tokens)


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
    return matches

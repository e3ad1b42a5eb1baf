"""Many shards into one. The work is done by csrc/indexed_dataset/merge.cpp."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards import _indexed_dataset
from illada_megatron.data.shards.indexed_dataset import IndexedDataset, Progress, publish_shard
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from illada_megatron.data.shards.prefix_lock import locked_prefix
from illada_megatron.data.shards.shard_list import FoundShard
from illada_megatron.system.whole_file import TEMPORARY, temporary_suffix


@dataclass(frozen=True)
class MergeSummary:
    """What came out. manifest_path: written where all inputs were listed by manifests that agree."""

    documents: int
    tokens: int
    bin_bytes: int
    seconds: float
    manifest_path: Path | None


def merge(shards: Sequence[FoundShard], output_prefix: str | Path, progress: Progress | None = None) -> MergeSummary:
    """Write `output_prefix`.bin and .idx: the documents of all shards, in order, with their sequences.

    The indexes are checked first; the tokens are not, unless the shards come from manifests: then the result is
    verified against their vocabulary and listed, with its checksums, in `output_prefix`.manifest.json. The files get
    their names when they are complete and on the device.

    progress: see `Progress`; `progress_bytes` is the total. Raises DataError, also where something is under
    `output_prefix` already or another process is making it, and OSError."""
    begin = time.perf_counter()
    origin = _common_manifest(shards)
    _require_same_tokenizer(shards)
    prefix, manifest_path = str(output_prefix), Path(f"{output_prefix}.manifest.json") if origin else None
    with locked_prefix(prefix) as lock, lock.noted():
        _require_free(prefix)
        if lock.works:
            _remove_leftovers(Path(prefix))
        suffix = temporary_suffix()
        _indexed_dataset.merge_shards([shard.prefix for shard in shards], prefix, suffix, progress)
        try:
            merged = IndexedDataset(prefix, suffix)
            listed = _listed(merged, origin, progress) if origin else None
            publish_shard(prefix, suffix)
        finally:
            for end in (".bin", ".idx"):
                Path(f"{prefix}{end}{suffix}").unlink(missing_ok=True)
        if listed and manifest_path:
            write_manifest(listed, manifest_path, replace=False)
    bin_bytes = merged.num_tokens * merged.dtype.itemsize
    return MergeSummary(merged.num_documents, merged.num_tokens, bin_bytes, time.perf_counter() - begin, manifest_path)


def _require_free(prefix: str) -> None:
    """A corpus of several shards has no PREFIX.bin: its manifest would be the one to be replaced."""
    for end in (".bin", ".idx", ".manifest.json", ".job.json"):
        if os.path.lexists(prefix + end):
            raise DataError(f"{prefix}{end}: there already: choose another output prefix, or remove what is there")


def _remove_leftovers(prefix: Path) -> None:
    """Of killed merges; the prefix is this process's, so that none is at work."""
    name = re.compile(rf"{re.escape(prefix.name)}\.(bin|idx|manifest\.json|lock\.json){TEMPORARY}")
    for path in prefix.parent.iterdir():
        if name.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _listed(merged: IndexedDataset, origin: Manifest, progress: Progress | None) -> Manifest:
    """The manifest of what was merged, which is verified."""
    checksums = merged.verify(origin.vocab_size, progress)
    entry = ShardEntry(
        path=Path(merged.prefix).name,
        dtype=str(merged.dtype),  # type: ignore[arg-type]
        tokens=merged.num_tokens,
        documents=merged.num_documents,
        bin_xxh3_128=checksums.bin_xxh3_128,
        idx_xxh3_128=checksums.idx_xxh3_128,
    )
    return origin.model_copy(update={"shards": (entry,)})


def progress_bytes(shards: Sequence[FoundShard]) -> int:
    """What `merge` reports in all; where it verifies, a few bytes less, as indexes lose their headers. Files that are
    missing count 0."""
    copied = sum(path.stat().st_size for shard in shards if (path := Path(f"{shard.prefix}.bin")).exists())
    if not _common_manifest(shards):
        return copied
    return 2 * copied + sum(path.stat().st_size for shard in shards if (path := Path(f"{shard.prefix}.idx")).exists())


def _common_manifest(shards: Sequence[FoundShard]) -> Manifest | None:
    """The manifest whose vocabulary and tokenizer hold for all, if each is listed by one."""
    manifests = [shard.manifest for shard in shards]
    return manifests[0] if all(manifests) else None


def _require_same_tokenizer(shards: Sequence[FoundShard]) -> None:
    """Ids of different tokenizers mean different text: merged, they would be noise that nothing notices."""
    known: tuple[FoundShard, Manifest] | None = None
    beside = _ManifestsBeside()
    for shard in shards:
        if (manifest := shard.manifest or beside.of(shard.prefix)) is None:
            continue
        known = known or (shard, manifest)
        first, of_first = known
        for field in ("vocab_size", "tokenizer_sha256"):
            expected, found = getattr(of_first, field), getattr(manifest, field)
            if found != expected:
                raise DataError(
                    f"{shard.prefix}: its manifest has {field} {found}, expected {expected} as for {first.prefix}: "
                    "shards of different tokenizers cannot be merged"
                )


class _ManifestsBeside:
    """Of shards that were named without one: PREFIX.manifest.json of PREFIX or PREFIX_00000, where it lists them."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[Manifest, frozenset[str]] | None] = {}

    def of(self, prefix: str) -> Manifest | None:
        for name in (prefix, re.sub(r"_[0-9]+$", "", prefix)):
            path = Path(f"{name}.manifest.json")
            if path not in self._read:
                self._read[path] = None
                if path.is_file():
                    manifest = read_manifest(path)
                    self._read[path] = manifest, frozenset(entry.path for entry in manifest.shards)
            if (found := self._read[path]) is not None and Path(prefix).name in found[1]:
                return found[0]
        return None

"""Manifests: what they list is what is read, what is wrong with them is said."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, file_checksum, read_manifest, write_manifest
from illada_megatron.data.shards.shard_list import list_shards


@pytest.fixture
def manifest(write_shard, tmp_path: Path) -> Path:
    """Two shards of 100 and 50 tokens, listed by relative paths."""
    entries = []
    for name, tokens in (("b", range(100)), ("a", range(100, 150))):
        shard = IndexedDataset(write_shard(name, [tokens]))
        entries.append(
            ShardEntry(
                path=name,
                dtype=shard.dtype.name,
                tokens=shard.num_tokens,
                documents=1,
                bin_xxh3_128=file_checksum(shard.bin_path),
                idx_xxh3_128=file_checksum(shard.idx_path),
            )
        )
    path = tmp_path / "both.manifest.json"
    write_manifest(Manifest(vocab_size=1000, tokenizer_sha256="ab" * 32, shards=tuple(entries)), path)
    return path


def test_written_manifest_is_read_back(manifest: Path) -> None:
    read = read_manifest(manifest)
    assert [shard.path for shard in read.shards] == ["b", "a"]
    assert read.num_tokens == 150
    assert [path.name for path in manifest.parent.glob(".*")] == [], "the temporary file stayed"


def test_corpus_reads_the_shards_in_the_manifests_order(manifest: Path, monkeypatch) -> None:
    corpus = Corpus([manifest], 50, seed=1, shuffle=False, vocab_size=1000)
    assert np.concatenate([corpus[i] for i in range(3)]).tolist() == list(range(150))
    monkeypatch.chdir(manifest.parent)
    assert [shard.prefix for shard in list_shards(["both.manifest.json"]).shards] == ["b", "a"]


def test_listing_opens_no_shard(manifest: Path) -> None:
    """Thousands of ranks list thousands of shards: the manifest is all that is read."""
    for path in manifest.parent.glob("[ab].*"):
        path.unlink()
    assert list_shards([manifest]).num_tokens == 150
    corpus = Corpus([manifest], 50, seed=1, shuffle=False, vocab_size=1000)
    with pytest.raises(DataError, match=r"b\.bin"):
        corpus[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: "),
        ({"format": "other"}, "format: "),
        ({"shards": []}, "shards: "),
        ({"vocab_size": 0}, "vocab_size: "),
        ({"extra": 1}, "extra: "),
        ({"shards": [{"path": "b", "dtype": "float32", "tokens": 1, "documents": 1}]}, r"shards\.0\.dtype: "),
        ({"shards": [{"path": "b", "dtype": "uint16", "tokens": "1", "documents": 1}]}, r"shards\.0\.tokens: "),
        ({"shards": [{"path": "b", "dtype": "uint16", "tokens": -1, "documents": 1}]}, r"shards\.0\.tokens: "),
    ],
)
def test_wrong_field_is_named(manifest: Path, change: dict, message: str) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(DataError, match=re.escape(f"{manifest}: ") + message):
        read_manifest(manifest)


def test_broken_files_are_errors(manifest: Path, tmp_path: Path) -> None:
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"both\.manifest\.json: the file: Invalid JSON"):
        list_shards([manifest])
    with pytest.raises(DataError, match=r"none\.json: no such manifest"):
        list_shards([tmp_path / "none.json"])


def test_shard_that_is_not_as_long_as_listed_is_an_error(manifest: Path) -> None:
    """A manifest of another version of the shards: windows would be cut at other places on every rank that has it."""
    bin_path = manifest.parent / "a.bin"
    bin_path.write_bytes(bin_path.read_bytes()[:-2])
    corpus = Corpus([manifest], 50, seed=1, shuffle=False, vocab_size=1000)
    assert corpus[0].tolist() == list(range(50))
    with pytest.raises(DataError, match=r"a\.bin.*98.*100"):
        corpus[2]


def test_twice_the_same_shard_is_an_error(manifest: Path) -> None:
    with pytest.raises(DataError, match=r"b: this shard is listed 2 times"):
        list_shards([manifest, manifest.parent / "b"])

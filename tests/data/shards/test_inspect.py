"""What is said about shards is true, and a verification finds every damaged byte."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from illada_megatron.data.shards.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from illada_megatron.data.shards.inspect import LengthStatistics, count_lengths, printable, sample_texts, verify_shard
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, file_checksum, write_manifest
from illada_megatron.data.shards.shard_list import FoundShard, find_shards
from illada_megatron.data.tokenizers.tokenizer import Tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "inspect_dataset.py"


def _entry(prefix: Path) -> ShardEntry:
    dataset = IndexedDataset(prefix)
    return ShardEntry(
        path=prefix.name,
        dtype="uint16",
        tokens=dataset.num_tokens,
        documents=dataset.num_documents,
        bin_xxh3_128=file_checksum(dataset.bin_path),
        idx_xxh3_128=file_checksum(dataset.idx_path),
    )


@pytest.fixture
def listed(write_shard, tmp_path: Path) -> Path:
    """A manifest of two shards."""
    prefixes = [write_shard("a", [[1, 2, 3], [], [4]]), write_shard("b", [[5] * 100])]
    write_manifest(Manifest(vocab_size=1000, shards=tuple(map(_entry, prefixes))), tmp_path / "corpus.json")
    return tmp_path / "corpus.json"


def _inspect(*arguments: object) -> tuple[int, str]:
    run = [sys.executable, str(TOOL), *map(str, arguments)]
    finished = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert "Traceback" not in finished.stderr
    return finished.returncode, finished.stdout + finished.stderr


def test_lengths_are_counted_in_buckets(tmp_path: Path) -> None:
    """Over more documents than are counted at a time, and two shards."""
    generator = np.random.default_rng(0)
    statistics, everything = LengthStatistics(), []
    for i, count in enumerate([(1 << 20) + 5, 1000]):
        lengths = np.floor(2 ** generator.uniform(0, 8, count)).astype(np.int64) - 1
        with IndexedDatasetWriter(tmp_path / str(i), 10) as writer:
            writer.add(np.ones(lengths.sum(), dtype=np.uint16), lengths)
        count_lengths(IndexedDataset(tmp_path / str(i)), statistics)
        everything.append(lengths)
    lengths = np.concatenate(everything)
    assert (statistics.documents, statistics.tokens) == (len(lengths), lengths.sum())
    assert (statistics.shortest, statistics.longest) == (lengths.min(), lengths.max())
    buckets = list(statistics.buckets())
    assert [(low, high) for low, high, _ in buckets] == [(0, 0), *((1 << k, (2 << k) - 1) for k in range(8))]
    assert all(count == ((low <= lengths) & (lengths <= high)).sum() for low, high, count in buckets)
    low, high = statistics.median_bucket()
    assert low <= np.median(lengths) <= high


def test_tool_shows_what_is_there(listed: Path) -> None:
    status, output = _inspect(listed, "--verify")
    assert status == 0, output
    assert "verified: 2 shards, no problems" in output
    assert "shortest 0, median 1 to 1, mean 26.0, longest 100" in output
    row = next(line for line in output.splitlines() if "all 2" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["all 2", "uint16", "4", "104", "208", "164"]


def test_tool_reads_folders_globs_and_prefixes(listed: Path) -> None:
    for path in (listed.parent, listed.parent / "?", listed.parent / "a"):
        assert _inspect(path)[0] == 0


def test_tool_lists_all_problems(listed: Path) -> None:
    """One shard is damaged, the other has an id outside of the vocabulary: both are named."""
    folder = listed.parent
    with (folder / "a.bin").open("r+b") as stream:
        stream.write(b"\x09")
    status, output = _inspect(listed, "--verify")
    assert status == 1
    assert "/a: bin_xxh3_128 is " in output
    with (folder / "b.bin").open("r+b") as stream:
        stream.write(b"\xff\xff")
    (folder / "a.idx").unlink()
    status, output = _inspect(listed, "--verify")
    assert status == 1
    assert "a.idx: no such file" in output
    assert "b.bin: token id 65535 at token offset 0 is not in the vocabulary of size 1000" in output
    assert output.count("problem: ") == 2
    assert _inspect(listed)[0] == 1
    assert _inspect(folder / "b")[0] == 0
    assert _inspect(folder / "b", "--verify")[0] == 0
    assert _inspect(folder / "b", "--verify", "--vocab-size", 65535)[0] == 1
    assert _inspect(folder / "nothing*")[0] == 2


def test_every_changed_byte_is_found(listed: Path) -> None:
    """Of both files: by the checks or by the checksums."""
    for shard in find_shards([listed]):
        assert verify_shard(shard) == []
        for suffix in (".bin", ".idx"):
            path = Path(shard.prefix + suffix)
            content = path.read_bytes()
            for position in range(len(content)):
                damaged = bytearray(content)
                damaged[position] ^= 1
                path.write_bytes(damaged)
                assert verify_shard(shard), (path, position)
            path.write_bytes(content)


def test_whatever_differs_from_the_manifest_is_named(write_shard) -> None:
    prefix = write_shard("a", [[1, 2, 3], [4]])
    entry = ShardEntry(path="a", dtype="int32", tokens=5, documents=3, bin_xxh3_128="0" * 32)
    shard = FoundShard(str(prefix), Manifest(vocab_size=1000, shards=(entry,)), entry)
    problems = verify_shard(shard)
    assert [problem.split(": ")[1].split(" is ")[0] for problem in problems] == [
        *("dtype", "tokens", "documents", "bin_xxh3_128")
    ]
    assert "tokens is 4, expected 5 as its manifest lists" in problems[1]


def test_samples_are_text_that_cannot_steer_a_terminal(
    tmp_path: Path, sentencepiece_tokenizer: Tokenizer, sentencepiece_path: Path
) -> None:
    texts = ["plain text", "red \x1b[31m\nnext [bold]line[/bold] \u202egnp.exe"]
    with IndexedDatasetWriter(tmp_path / "shard", sentencepiece_tokenizer.vocab_size) as writer:
        for text in texts:
            ids = sentencepiece_tokenizer.encode(text)
            writer.add(np.array(ids), [len(ids)])
    samples = dict(sample_texts(IndexedDataset(tmp_path / "shard"), sentencepiece_tokenizer, 10))
    assert samples == {0: "plain text", 1: r"red \x1b[31m\nnext [bold]line[/bold] \u202egnp.exe"}
    status, output = _inspect(tmp_path / "shard", "--tokenizer-model", sentencepiece_path)
    assert status == 0
    assert rf"document 1: {samples[1]}" in output
    assert printable("a\tb\x00ü") == r"a\tb\x00ü"


def test_ids_that_a_tokenizer_does_not_have_are_a_problem(write_shard, sentencepiece_path: Path) -> None:
    prefix = write_shard("shard", [[60_000]], vocab_size=65_536)
    status, output = _inspect(prefix, "--tokenizer-model", sentencepiece_path)
    assert status == 1
    assert "does not read its ids: token id is 60000" in output

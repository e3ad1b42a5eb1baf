"""The benchmarks of data in miniature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Benchmark = Callable[..., dict[str, Any]]


def test_merge_and_verify_against_cp(benchmark: Benchmark, tmp_path: Path) -> None:
    sizes = ("--shards", 2, "--shard-tokens", 10_000, "--rounds", 1)
    report = benchmark("data.merge", "--directory", tmp_path, *sizes)
    assert report["seconds"].keys() == {"cp", "cp, flushed", "merge", "verify"}
    assert not list(tmp_path.iterdir())


def test_random_samples_by_every_reader(benchmark: Benchmark, tmp_path: Path) -> None:
    sizes = ("--tokens", 100_000, "--sequence-length", 64, "--batches", 2, "--rounds", 2)
    report = benchmark("data.read_samples", "--directory", tmp_path, *sizes)
    assert {"memcpy in a C loop", "TokenReader, uint16", "GPTDataset"} <= report["to_memcpy"].keys()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_corpora_are_opened_and_read_far_behind(benchmark: Benchmark, tmp_path: Path) -> None:
    """Shards are sparse: 40 of them are 1.3 TB apparent size."""
    sizes = ("--shards", 40, "--peer-size", 10_000, "--rounds", 1)
    figures = benchmark("data.corpus_open", "--folder", tmp_path, *sizes)["figures"]
    ours = [found for found in figures.values() if found["tokens"] == 40 * 8e9]
    assert len(ours) == 5
    assert len(figures) == 7
    for found in ours:
        # medians of a thousand each, in turns: far apart they are when what a sample takes grows with its place
        assert found["far_over_near"] < 3


@pytest.mark.slow
def test_preprocessing_gives_the_peers_ids(benchmark: Benchmark, tmp_path: Path) -> None:
    sizes = ("--size-mb", 2, "--part-mb", 1, "--vocab-size", 2_000, "--rounds", 1)
    report = benchmark("data.preprocess", "--work-dir", tmp_path, *sizes)
    assert report["tokenizers"].keys() == {"bpe_2_mb", "sentencepiece_2_mb"}
    for found in report["tokenizers"].values():
        assert found["documents_compared"] > 0
        assert found["documents_that_differ"] == 0

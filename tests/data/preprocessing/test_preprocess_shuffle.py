"""Shuffled documents: all of them, once, in an order that depends on nothing but the seed and the shard."""

from pathlib import Path

import numpy as np
import pytest

from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess
from illada_megatron.data.preprocessing.shuffle import DocumentShuffle
from illada_megatron.data.shards.indexed_dataset import IndexedDataset


def _documents(prefix: Path) -> list[bytes]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tobytes() for i in range(dataset.num_documents)]


def test_a_permutation_that_the_seed_decides(sentencepiece_path: Path, jsonl: Path, tmp_path: Path) -> None:
    made = {}
    for name, seed in (("plain", None), ("one", 1), ("again", 1), ("two", 2)):
        options = PreprocessOptions(shuffle_seed=seed, shuffle_buffer_mb=0.3)
        preprocess([jsonl, jsonl], tmp_path / name, sentencepiece_path, options)
        made[name] = _documents(tmp_path / name)
    assert made["one"] == made["again"]
    assert len({tuple(made[name]) for name in ("plain", "one", "two")}) == 3
    assert sorted(made["plain"]) == sorted(made["one"]) == sorted(made["two"])


@pytest.mark.parametrize("buffer_bytes", [4, 4000, 40_000, 1 << 20])
def test_documents_stay_whole_within_a_bounded_buffer(buffer_bytes: int) -> None:
    """Document k is k+1 times the number k, some of them empty; batches of 1 to 90 documents."""
    generator = np.random.Generator(np.random.Philox(3))
    shuffle = DocumentShuffle(5, (0, 0), buffer_bytes, 1000)
    given: list[np.ndarray] = []
    first, taken_in, given_out, most, largest = 0, 0, 0, 0, 0
    while first < 1000:
        ids = np.arange(first, min(1000, first + int(generator.integers(1, 90))))
        lengths = np.where(ids % 7 == 0, 0, ids + 1).astype(np.int64)
        tokens = np.repeat(ids, lengths).astype(np.int32)
        taken_in += len(tokens)
        for some, some_lengths in shuffle.add(tokens, lengths):
            given += np.split(some, np.cumsum(some_lengths)[:-1])
            given_out += len(some)
        largest = max(largest, len(tokens))
        most = max(most, taken_in - given_out)
        first = int(ids[-1]) + 1
    for some, some_lengths in shuffle.finish():
        given += np.split(some, np.cumsum(some_lengths)[:-1])
    assert len(given) == 1000
    assert all(
        (document == document[0]).all() and len(document) == document[0] + 1 for document in given if len(document)
    )
    numbers = [int(document[0]) for document in given if len(document)]
    assert sorted(numbers) == [k for k in range(1000) if k % 7]
    assert most <= max(buffer_bytes // 4, largest)  # uint16, twice
    if buffer_bytes > 4000:
        assert numbers != sorted(numbers)


def test_the_order_never_changes() -> None:
    """Golden: shards of one corpus may be written by two releases."""
    shuffle = DocumentShuffle(1234, (7, 0), 1 << 20, 100_000)
    assert list(shuffle.add(np.arange(12, dtype=np.int32), np.ones(12, dtype=np.int64))) == []
    (order, _), *_ = shuffle.finish()
    assert order.tolist() == [4, 1, 7, 8, 2, 3, 6, 9, 5, 10, 0, 11]

"""Where documents begin, found in an index that is read in a few pieces."""

import functools
import os
import re
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards import document_index
from illada_megatron.data.shards.document_index import DocumentIndex, open_document_index
from illada_megatron.data.shards.shard_list import Shard

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets import indexed_dataset as megatron

HEADER_BYTES = 34


def index_bytes(lengths: np.ndarray, bounds: np.ndarray | None = None) -> bytes:
    """An index of sequences of uint16 tokens; without `bounds` each is a document."""
    if bounds is None:
        bounds = np.arange(len(lengths) + 1)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(bounds))
    pointers = 2 * (np.cumsum(lengths) - lengths)
    return header + b"".join(a.astype(t).tobytes() for a, t in ((lengths, "<i4"), (pointers, "<i8"), (bounds, "<i8")))


class Counted:
    """An index in memory, and what was read of it."""

    def __init__(self, content: bytes, tokens: int) -> None:
        self.reads: list[tuple[int, int]] = []

        def read(offset: int, length: int) -> bytes:
            self.reads.append((offset, length))
            return content[offset : offset + length]

        self.index = DocumentIndex(Shard("counted", "uint16", tokens), len(content), read)


def uniform(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, 40, 30_000)


def runs_of_empty_ones(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, 4, 30_000) * (generator.random(30_000) < 0.3)


def short_then_long(generator: np.random.Generator) -> np.ndarray:
    """Far from a straight line: nearly all documents lie in a thousandth of the tokens."""
    return np.concatenate([generator.integers(1, 3, 29_000), generator.integers(1, 10**6, 1000)])


def one_that_has_nearly_all(generator: np.random.Generator) -> np.ndarray:
    lengths = generator.integers(0, 3, 30_000)
    lengths[12_345] = 10**9
    return lengths


SHAPES = [uniform, runs_of_empty_ones, short_then_long, one_that_has_nearly_all]


@pytest.mark.parametrize("piece_entries", [3, 100, 1 << 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_a_plain_search(
    shape: Callable[[np.random.Generator], np.ndarray], piece_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_index, "_PIECE_ENTRIES", piece_entries)
    generator = np.random.default_rng(0)
    lengths = shape(generator)
    tokens = int(lengths.sum())
    starts = np.cumsum(lengths) - lengths
    index = Counted(index_bytes(lengths), tokens).index
    # at places in general, and around the documents' own
    places = [*generator.integers(0, tokens, 150), *(starts[generator.integers(0, len(starts), 150)] - 1).clip(0)]
    for start, length in zip(places, generator.integers(1, 300, 300), strict=True):
        stop = min(int(start + length), tokens)
        expected = np.unique(starts[(starts > start) & (starts < stop)])
        assert np.array_equal(index.document_starts(int(start), stop), expected), (start, stop)
        assert index.document_at(int(start)) == int(np.searchsorted(starts, start, side="right")) - 1


def test_every_window_of_a_small_shard(write_shard) -> None:
    """Strictly inside, ascending, once each: an empty document begins where the next one does."""
    documents: Sequence[Sequence[int]] = [[], [1, 2], [3], [], [], [4, 5, 6], [7], []]
    shard = Shard(str(write_shard("shard", documents)), "uint16", 7)
    with open_document_index(shard) as index:
        for start in range(8):
            for stop in range(start, 8):
                expected = [offset for offset in (0, 2, 3, 6) if start < offset < stop]
                assert index.document_starts(start, stop).tolist() == expected, (start, stop)
        assert [index.document_at(token) for token in range(7)] == [1, 1, 2, 5, 5, 5, 6]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "shard.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.end_document()
    builder.add_document(torch.tensor([6, 7, 8]), [1, 2])
    builder.finalize(str(tmp_path / "shard.idx"))
    with open_document_index(Shard(str(tmp_path / "shard"), "int32", 8)) as index:
        assert index.document_starts(0, 8).tolist() == [5]
        assert [index.document_at(token) for token in (0, 4, 5, 7)] == [0, 0, 2, 2]


def test_a_large_index_is_not_read_for_a_window() -> None:
    """Two million documents of lognormal lengths, as the web has: three pieces of 32 KB for most windows, where halving
    takes twenty reads; and of an index that is far from a straight line still no more than halving does."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(500), 1.2, 2_000_000)).astype(np.int64) + 1
    counts = []
    for many, windows in ((lengths, 200), (np.sort(lengths) ** 2, 50)):
        tokens = int(many.sum())
        counted, content = [], index_bytes(many)
        for start in generator.integers(0, tokens - 8192, windows):
            one = Counted(content, tokens)
            one.index.document_starts(int(start), int(start) + 8192)
            counted.append(len({read for read in one.reads if read[0]}))
            assert max(length for _, length in one.reads) <= 1 << 15
        counts.append(counted)
    assert np.mean(counts[0]) <= 4
    assert max(counts[0]) <= 8
    assert max(counts[1]) <= 2 * 3 * 21


def test_what_is_read_is_checked(write_shard) -> None:
    """No entry there may lead outside of the files."""
    prefix = write_shard("shard", [[1, 2]] * 100)
    path, shard = Path(f"{prefix}.idx"), Shard(str(prefix), "uint16", 200)
    pristine = path.read_bytes()
    pointer, bound = HEADER_BYTES + 400 + 8 * 50, HEADER_BYTES + 400 + 800 + 8 * 50
    for offset, values in ((pointer, (-2, 101 * 4, 2**62, 201, 0)), (bound, (-1, 101, 2**62, 3))):
        for value in values:
            content = bytearray(pristine)
            content[offset : offset + 8] = struct.pack("<q", value)
            path.write_bytes(content)
            for start, stop in ((90, 110), (99, 102)):
                with pytest.raises(DataError, match=re.escape(f"{path}: ")), open_document_index(shard) as index:
                    index.document_starts(start, stop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: b"X"}, "starts with b'XMIDIDX"),
        ({9: b"\2"}, "version 2, expected Megatron's"),
        ({17: b"\4"}, r"has dtype code 4, expected 8 \(uint16\) as was listed"),
        ({18: b"\4"}, r"bytes long, expected \d+ bytes for the 4 sequences and 6 document bounds"),
        ({18: b"\xff" * 16}, r"bytes long, expected \d+ bytes for the 18446744073709551615 sequences"),
        ({18: bytes(16)}, "for the 0 sequences and 0 document bounds it announces, at least one of each"),
        ({HEADER_BYTES + 16: b"\1"}, "lists 15 tokens, expected 19 as the manifest says"),
        ({HEADER_BYTES + 19: b"\xff"}, "lists -"),
    ],
)
def test_wrong_headers_and_ends_are_refused(write_shard, change: dict[int, bytes], message: str) -> None:
    prefix = write_shard("shard", [[1, 2, 3], [4], [5] * 4, [6] * 6, [7] * 5])
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    for at, new in change.items():
        content[at : at + len(new)] = new
    path.write_bytes(content)
    with (
        pytest.raises(DataError, match=rf"shard\.idx: .*{message}"),
        open_document_index(Shard(str(prefix), "uint16", 19)),
    ):
        pass


def test_a_file_that_is_missing_short_or_cannot_be_read_is_named(write_shard, tmp_path: Path) -> None:
    shard = Shard(str(write_shard("shard", [[1] * 5] * 10_000)), "uint16", 50_000)
    path = Path(f"{shard.prefix}.idx")
    message = r"shard\.idx: ends at byte 100000, expected 200042 bytes as when it was opened: it was truncated"
    with open_document_index(shard):
        os.truncate(path, 100_000)  # it stays open
    with pytest.raises(DataError, match=message), open_document_index(shard) as index:
        index.document_starts(49_000, 49_100)
    os.truncate(path, 20)
    with pytest.raises(DataError, match=r"shard\.idx: is 20 bytes long"), open_document_index(shard):
        pass
    path.unlink()
    with pytest.raises(DataError, match=r"shard\.idx: no such file"), open_document_index(shard):
        pass
    path.mkdir()
    with pytest.raises(DataError, match=r"shard\.idx: is no regular file"), open_document_index(shard):
        pass
    del index
    assert not [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link).startswith(str(tmp_path))]


def test_the_last_used_files_stay_open(write_shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening is a round trip of a network file system, for each window. No more than so many; also in a forked child,
    where neither moves the other's place in the file."""
    monkeypatch.setattr(document_index, "_opened", functools.lru_cache(3)(document_index._opened.__wrapped__))
    shards = [Shard(str(write_shard(f"{n}", [[1, 2], [3] * (n + 1)])), "uint16", n + 3) for n in range(8)]

    def starts(shard: Shard) -> list[int]:
        with open_document_index(shard) as index:
            return index.document_starts(0, shard.tokens).tolist()

    for shard in shards:
        assert starts(shard) == [2]
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert sorted(link for link in links if link.startswith(str(tmp_path))) == [
        f"{one.prefix}.idx" for one in shards[5:]
    ]
    for shard in shards:
        Path(f"{shard.prefix}.idx").unlink()
    assert starts(shards[6]) == starts(shards[7]) == [2]
    if (child := os.fork()) == 0:
        os._exit(0 if starts(shards[5]) == [2] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert starts(shards[5]) == [2]
    with pytest.raises(DataError, match=r"0\.idx: no such file"):
        starts(shards[0])
    with pytest.raises(DataError, match=r"7\.idx: no such file"):  # after an error each is opened anew
        starts(shards[7])


def test_a_pipe_is_no_index(write_shard) -> None:
    """It was waited for, for ever."""
    shard = Shard(str(write_shard("shard", [[1, 2]])), "uint16", 2)
    path = Path(f"{shard.prefix}.idx")
    path.unlink()
    os.mkfifo(path)
    script = """
import sys
from illada_megatron.data.corpus.stream import TokenStream
from illada_megatron.data.shards.shard_list import Shard
TokenStream([Shard(sys.argv[1], "uint16", 2)]).document_starts(0, 2)
"""
    result = subprocess.run([sys.executable, "-c", script, shard.prefix], capture_output=True, text=True, timeout=300)
    assert "shard.idx: is no regular file" in result.stderr

"""Indexes that nobody wrote: mutated ones, and ones larger than any this machine could hold."""

import contextlib
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards._indexed_dataset import IndexFile, TokenReader
from illada_megatron.data.shards.document_index import close_document_indexes, open_document_index
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.shard_list import Shard

SEEDS = sorted((Path(__file__).parents[2] / "fuzz" / "seeds").glob("*.idx"))
HEADER_BYTES = 34


def document_starts(shard: Shard, start: int, stop: int) -> np.ndarray:
    with open_document_index(shard) as index:
        return index.document_starts(start, stop)


def _end_bytes(content: bytes) -> int:
    """Where the index says that its .bin ends, if it says something that a file can be."""
    if len(content) < HEADER_BYTES:
        return 0
    code, sequences = struct.unpack_from("<BQ", content, 17)
    if not 1 <= sequences <= (len(content) - HEADER_BYTES) // 12:
        return 0
    (length,) = struct.unpack_from("<i", content, HEADER_BYTES + 4 * (sequences - 1))
    (pointer,) = struct.unpack_from("<q", content, HEADER_BYTES + 12 * sequences - 8)
    end = pointer + length * {4: 4, 5: 8}.get(code, 2)
    return end if 0 <= end <= 1 << 40 else 0


def _mutate(content: bytes, generator: np.random.Generator) -> bytes:
    """One to four changes: a bit, a byte, an 8-byte number of the awkward ones, a cut, a doubled or removed piece."""
    data = bytearray(content)
    for _ in range(generator.integers(1, 5)):
        at = int(generator.integers(0, len(data) or 1))
        kind = generator.integers(0, 6)
        if kind == 0 and data:
            data[at] ^= 1 << int(generator.integers(0, 8))
        elif kind == 1 and data:
            data[at] = int(generator.integers(0, 256))
        elif kind == 2:
            value = int(generator.choice([0, 1, 2, -1, -(2**63), 2**63 - 1, 2**31, 2**32, 2**61, len(data)]))
            data[at : at + 8] = struct.pack("<q", value)
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = data[at : at + 8]
        else:
            del data[at : at + int(generator.integers(1, 17))]
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.stem)
def test_mutated_indexes_are_opened_or_refused(seed: Path, tmp_path: Path) -> None:
    """A DataError or right answers: never another exception, never a crash. The .bin has the size that the index asks
    for wherever that is possible, so that more than the size is put to the test."""
    generator = np.random.default_rng(0)
    pristine = seed.read_bytes()
    idx, bin_ = tmp_path / "shard.idx", tmp_path / "shard.bin"
    bin_.touch()
    opened = 0
    for attempt in range(1000):
        content = _mutate(pristine, generator) if attempt else pristine
        idx.write_bytes(content)
        close_document_indexes()
        with bin_.open("r+b") as stream:
            stream.truncate(_end_bytes(content))
        try:
            dataset = IndexedDataset(tmp_path / "shard")
        except DataError:
            continue
        opened += 1
        tokens = dataset.num_tokens
        shard = Shard(dataset.prefix, dataset.dtype.name, tokens)
        for call in (dataset.read, dataset.document_lengths, dataset._index.check):
            with contextlib.suppress(DataError):
                call(0, dataset.num_documents if call == dataset.document_lengths else min(tokens, 1000))
        for start, stop in ((0, tokens), (tokens // 3, tokens // 2), (tokens - 5, tokens)):
            with contextlib.suppress(DataError):
                answer = document_starts(shard, start, stop)
                assert (np.diff(answer) > 0).all()
                assert (answer > start).all()
                assert (answer < stop).all()
            with contextlib.suppress(DataError), open_document_index(shard) as index:
                assert 0 <= index.document_at(max(start, 0)) < max(dataset.num_documents, 1)
    assert opened >= (1 if seed.stem.startswith(("ours", "one", "megatron")) else 0)


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """.idx and .bin, removed at the end: whoever copies the temporary directory would write the holes out."""
    paths = tmp_path / "shard.idx", tmp_path / "shard.bin"
    yield paths
    for path in paths:
        path.unlink(missing_ok=True)


def test_an_index_beyond_2_to_the_31_documents_and_2_to_the_40_tokens(sparse: tuple[Path, Path]) -> None:
    """A shard of 43 GB of index and 2.6 TB of tokens, nearly all of it holes: all documents but the last 600 are empty.
    Any 32-bit number on the way would show; so would an opening that reads more than the ends."""
    lengthy, documents = 600, (1 << 31) + 12_345
    length = 2**31 - 1
    tokens = lengthy * length
    assert tokens > 1 << 40
    idx, bin_ = sparse
    first = documents - lengthy
    try:
        with idx.open("wb") as stream:
            stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
            lengths, pointers = HEADER_BYTES, HEADER_BYTES + 4 * documents
            bounds = pointers + 8 * documents
            stream.seek(lengths + 4 * first)
            stream.write(np.full(lengthy, length, dtype="<i4").tobytes())
            stream.seek(pointers + 8 * first)
            stream.write((np.arange(lengthy, dtype="<i8") * (2 * length)).tobytes())
            stream.seek(bounds + 8 * first)
            stream.write(np.arange(first, documents + 1, dtype="<i8").tobytes())
        with bin_.open("wb") as stream:
            stream.truncate(2 * tokens)
            # seven tokens, the last of one document and the first of the next
            boundary = (lengthy - 1) * length
            stream.seek(2 * (boundary - 3))
            stream.write(np.arange(1, 8, dtype="<u2").tobytes())
    except OSError as error:
        pytest.skip(f"this file system has no sparse files of such sizes: {error}")
    begin = time.perf_counter()
    dataset = IndexedDataset(idx.with_suffix(""))
    assert time.perf_counter() - begin < 0.5
    assert (dataset.num_documents, dataset.num_tokens) == (documents, tokens)
    assert len(dataset.sequence_lengths) == documents
    shard = Shard(dataset.prefix, "uint16", tokens)
    assert document_starts(shard, boundary - 8192, boundary + 8192).tolist() == [boundary]
    assert document_starts(shard, 0, tokens).tolist() == [length * i for i in range(1, lengthy)]
    assert dataset.document(documents - 1)[:5].tolist() == [4, 5, 6, 7, 0]
    assert len(dataset.document(documents - 1)) == length
    assert dataset.document_lengths(first - 2, first + 2).tolist() == [0, 0, length, length]
    dataset._index.check(documents - 300, documents)
    out = np.empty((2, 9), dtype=np.int64)
    reader = TokenReader([str(bin_), str(bin_)], ["uint16"] * 2, [tokens] * 2)
    reader.read(np.array([boundary - 4, tokens + boundary - 4]), out, 8)
    assert out.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0]] * 2
    # an entry out of place in the middle of it all, which the search meets first
    with idx.open("r+b") as stream:
        stream.seek(bounds + 8 * (first + 598))
        stream.write(struct.pack("<q", documents + 1))
    with pytest.raises(DataError, match=rf"has bound {first + 598} at {documents + 1}, expected 0 to {documents}"):
        document_starts(shard, boundary - 2 * length, tokens)


def test_opening_reads_only_the_ends(sparse: tuple[Path, Path]) -> None:
    """A hole in a file is read as zeros at no cost: 86 GB of index are opened a thousand times in a moment."""
    documents = 1 << 32
    idx, bin_ = sparse
    try:
        with idx.open("wb") as stream:
            stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, documents, documents + 1))
            stream.seek(HEADER_BYTES + 4 * (documents - 1))
            stream.write(struct.pack("<i", 1))
            stream.seek(HEADER_BYTES + 20 * documents)
            stream.write(struct.pack("<q", documents))
    except OSError as error:
        pytest.skip(f"this file system has no sparse files of such sizes: {error}")
    bin_.write_bytes(b"\1\0\0\0")
    begin = time.perf_counter()
    for _ in range(1000):
        assert IndexFile(str(idx), str(bin_)).num_documents == documents
    assert time.perf_counter() - begin < 5

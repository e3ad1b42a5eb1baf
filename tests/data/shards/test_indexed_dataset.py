"""The reader: the same bytes as Megatron's, and no damaged shard is taken for a good one."""

import contextlib
import pickle
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from illada_megatron.data.shards.manifest import file_checksum

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets import indexed_dataset as megatron

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9, 10], [999]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, np.uint16), (65536, np.uint16), (65537, np.int32)])
def test_megatron_reads_what_we_write(write_shard, vocab_size: int, dtype: type) -> None:
    """A byte of difference in header, lengths, pointers, bounds or ids would show; the largest id is in it."""
    documents = [*DOCUMENTS, [vocab_size - 1]]
    dataset = megatron.IndexedDataset(str(write_shard("shard", documents, vocab_size)))
    assert dataset.index.dtype is dtype
    assert [sequence.tolist() for sequence in (dataset[i] for i in range(len(dataset)))] == documents
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.int64])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type) -> None:
    """Corpora made by Megatron's tools, of any id type, with several sequences in a document, have to work."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "shard.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6]), [1])
    builder.end_document()  # a document of no sequences
    builder.add_document(torch.tensor([7, 8]), [2])
    builder.finalize(str(tmp_path / "shard.idx"))
    dataset = IndexedDataset(tmp_path / "shard")
    assert (dataset.num_documents, dataset.num_tokens, dataset.dtype) == (4, 8, np.dtype(dtype))
    assert [dataset.document(i).tolist() for i in range(4)] == [[1, 2, 3, 4, 5], [6], [], [7, 8]]
    assert dataset.sequence_lengths.tolist() == [2, 3, 1, 2]
    assert dataset.read(0, 8).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_files_are_the_same_bytes_as_megatrons(write_shard, tmp_path: Path) -> None:
    ours = write_shard("ours", DOCUMENTS)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_batches_and_buffer_boundaries_leave_no_trace(tmp_path: Path) -> None:
    """5 million tokens in uneven batches of three types pass the 8 MiB buffer; a lost or doubled block would show."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 60000, 5_000_000)
    lengths = np.full(5000, 1000)
    with IndexedDatasetWriter(tmp_path / "shard", 60000) as writer:
        for start, end, dtype in [(0, 1, np.uint16), (1, 4500, np.int32), (4500, 5000, np.int64)]:
            writer.add(tokens[start * 1000 : end * 1000].astype(dtype), lengths[start:end])
    dataset = IndexedDataset(tmp_path / "shard")
    assert np.array_equal(dataset.read(0, 5_000_000), tokens)
    assert np.array_equal(dataset.document(4321), tokens[4_321_000:4_322_000])


def test_read_and_document_refuse_what_is_not_there(write_shard) -> None:
    """numpy would quietly return fewer tokens, or count from the end."""
    dataset = IndexedDataset(write_shard("shard", DOCUMENTS))
    assert dataset.read(11, 0).tolist() == []
    for start, length in [(-1, 2), (10, 2), (12, 0), (0, -1)]:
        with pytest.raises(IndexError, match="it has 11"):
            dataset.read(start, length)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"document {index} .* it has 5"):
            dataset.document(index)


def test_another_process_gets_the_path_and_not_a_copy_of_the_tokens(write_shard) -> None:
    """Handing a corpus to a spawned worker must not send terabytes through a pipe."""
    dataset = IndexedDataset(write_shard("shard", [[7] * 100_000]))
    message = pickle.dumps(dataset)
    assert len(message) < 1000
    assert pickle.loads(message).read(99_998, 2).tolist() == [7, 7]


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_missing_file_is_named(write_shard, missing: str) -> None:
    prefix = write_shard("shard", DOCUMENTS)
    Path(f"{prefix}{missing}").unlink()
    with pytest.raises(DataError, match=rf"shard\{missing}: no such file"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("change", [-1, -2, -21, 1, 2])
def test_bin_of_another_size_is_refused(write_shard, change: int) -> None:
    """A truncated copy, or one with something appended; both sizes are in the message."""
    prefix = write_shard("shard", DOCUMENTS)
    path = Path(f"{prefix}.bin")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(
        DataError, match=rf"shard\.bin: is {22 + change} bytes long, expected 22 bytes for the 11 uint16"
    ):
        IndexedDataset(prefix)


def test_empty_bin_is_refused(write_shard) -> None:
    prefix = write_shard("shard", DOCUMENTS)
    Path(f"{prefix}.bin").write_bytes(b"")
    with pytest.raises(DataError, match="is 0 bytes long, expected 22"):
        IndexedDataset(prefix)


def test_every_truncation_of_the_index_is_refused(write_shard) -> None:
    """At whichever byte the copy stopped."""
    prefix = write_shard("shard", DOCUMENTS)
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    assert len(content) == 34 + 5 * 12 + 6 * 8
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"shard\.idx: is {size} bytes long, expected"):
            IndexedDataset(prefix)


def test_every_flipped_byte_of_the_index_is_noticed(write_shard) -> None:
    """Each byte of the index, damaged in three ways, gives a DataError naming a file of the shard. Only the inner
    document bounds have a value or two that are as consistent as the true one; the token stream is the same then."""
    prefix = write_shard("shard", DOCUMENTS)
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    stream = IndexedDataset(prefix).read(0, 11).tolist()
    inner_bounds = range(34 + 5 * 12 + 8, len(content) - 8)
    for position in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            if position in inner_bounds:
                with contextlib.suppress(DataError):
                    IndexedDataset(prefix).verify()
                    assert IndexedDataset(prefix).read(0, 11).tolist() == stream
            else:
                with pytest.raises(DataError, match=re.escape(str(prefix))):
                    IndexedDataset(prefix).verify()


HEADER = struct.Struct("<9sQBQQ")


def _header(
    magic: bytes = b"MMIDIDX\0\0", version: int = 1, code: int = 8, sequences: int = 5, bounds: int = 6
) -> bytes:
    return HEADER.pack(magic, version, code, sequences, bounds)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (_header(magic=b"TNTIDX\0\0\0"), r"starts with b'TNTIDX.*expected b'MMIDIDX"),
        (_header(version=2), "format version 2, expected 1"),
        (_header(code=0), "dtype code 0, expected an integer type"),
        (_header(code=7), r"dtype code 7, expected an integer type: .*8 \(uint16\)"),
        (_header(code=4), r"shard\.bin: is 22 bytes long, expected 24 bytes for the 6 int32 tokens"),
        (_header(sequences=4), "is 142 bytes long, expected 130 bytes for the 4 sequences"),
        (_header(sequences=2**63), "is 142 bytes long, expected"),
        (_header(bounds=0), "has 0 document bounds"),
        (_header(bounds=7), "is 142 bytes long, expected 150"),
    ],
)
def test_wrong_header_says_found_and_expected(write_shard, header: bytes, message: str) -> None:
    prefix = write_shard("shard", DOCUMENTS)
    path = Path(f"{prefix}.idx")
    path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(DataError, match=message) as error:
        IndexedDataset(prefix)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "offset", "value", "message"),
    [
        ("<i4", 34, -3, "gives sequence 0 the length -3"),
        ("<i4", 34, 4, "places sequence 1 at byte 6, expected byte 8"),
        ("<i4", 34 + 4 * 4, 2, r"is 22 bytes long, expected 24 bytes"),
        ("<i8", 34 + 20 + 8 * 3, 0, "places sequence 3 at byte 0, expected byte 8"),
        ("<i8", 34 + 60, 1, "documents from sequence 1 to 5, expected from 0 to 5"),
        ("<i8", 34 + 60 + 8 * 5, 4, "documents from sequence 0 to 4, expected from 0 to 5"),
        ("<i8", 34 + 60 + 8 * 2, 4, "ends document 2 at sequence 3, expected sequence 4"),
    ],
)
def test_inconsistent_index_says_where(write_shard, dtype: str, offset: int, value: int, message: str) -> None:
    prefix = write_shard("shard", DOCUMENTS)
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + np.dtype(dtype).itemsize] = np.array(value, dtype=dtype).tobytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix).verify()


def test_index_of_another_shard_is_refused(write_shard) -> None:
    first, second = write_shard("first", DOCUMENTS), write_shard("second", [[1, 2, 3]])
    Path(f"{second}.idx").replace(f"{first}.idx")
    with pytest.raises(
        DataError, match=r"first\.bin: is 22 bytes long, expected 6 bytes .* first\.idx|first\.idx lists"
    ):
        IndexedDataset(first)


def test_multimodal_index_is_named_as_such(tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "shard.bin"), dtype=np.uint16, multimodal=True)
    builder.add_document(torch.tensor([1, 2]), [2], [1])
    builder.finalize(str(tmp_path / "shard.idx"))
    with pytest.raises(DataError, match="multimodal"):
        IndexedDataset(tmp_path / "shard")


def test_checks_hold_beyond_one_piece(tmp_path: Path) -> None:
    """The index is checked a million entries at a time: an error in the second piece gets its true number."""
    documents = (1 << 20) + 10
    with IndexedDatasetWriter(tmp_path / "shard", 10) as writer:
        writer.add(np.ones(documents, dtype=np.int32), np.ones(documents, dtype=np.int64))
    assert IndexedDataset(tmp_path / "shard").num_documents == documents
    path = tmp_path / "shard.idx"
    content = bytearray(path.read_bytes())
    content[34 + 4 * documents + 8 * ((1 << 20) + 3)] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"places sequence {(1 << 20) + 3} at byte"):
        IndexedDataset(tmp_path / "shard").verify()


@pytest.mark.parametrize("piece_bytes", [1 << 20, 6])
def test_verify_returns_the_checksums_of_the_files(write_shard, monkeypatch, piece_bytes: int) -> None:
    """Whatever the pieces; what is reported adds up to what was announced."""
    monkeypatch.setattr("illada_megatron.data.shards.indexed_dataset._PIECE_BYTES", piece_bytes)
    dataset = IndexedDataset(write_shard("shard", DOCUMENTS))
    reported: list[int] = []
    checksums = dataset.verify(vocab_size=1000, progress=reported.append)
    assert checksums.bin_xxh3_128 == file_checksum(dataset.bin_path)
    assert checksums.idx_xxh3_128 == file_checksum(dataset.idx_path)
    assert sum(reported) == dataset.verified_bytes == 22 + 34 + 5 * 12 + 6 * 8


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.int64])
def test_verify_names_the_first_id_outside_of_the_vocabulary(tmp_path: Path, dtype: type) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "shard.bin"), dtype=dtype)
    tokens = torch.arange(1000)
    tokens[700] = 1000 if dtype is np.uint16 else -1
    builder.add_document(tokens, [1000])
    builder.finalize(str(tmp_path / "shard.idx"))
    dataset = IndexedDataset(tmp_path / "shard")
    dataset.verify()
    # -1, read as an unsigned number, is in a vocabulary of more ids than the type has
    for vocab_size in (1000, *((65_536, 1 << 33) if dtype is not np.uint16 else ())):
        message = rf"shard\.bin: token id {tokens[700]} at token offset 700 .* size {vocab_size}: "
        with pytest.raises(DataError, match=message):
            dataset.verify(vocab_size=vocab_size)


def test_verify_notices_a_truncation_while_it_is_open(write_shard) -> None:
    dataset = IndexedDataset(write_shard("shard", DOCUMENTS))
    with dataset.bin_path.open("r+b") as stream:
        stream.truncate(20)
    with pytest.raises(DataError, match=r"shard\.bin: ends at byte 20, expected 22 bytes"):
        dataset.verify()


def test_a_damaged_entry_is_noticed_by_whoever_meets_it(write_shard) -> None:
    """Opening does not read the inside of the index: no entry there may lead outside of the files."""
    prefix = write_shard("shard", [[1, 2]] * 100)
    path = Path(f"{prefix}.idx")
    pristine = path.read_bytes()
    pointer, bound = 34 + 400 + 8 * 50, 34 + 400 + 800 + 8 * 50
    for offset, values in ((pointer, (-2, 101 * 4, 2**62, 201)), (bound, (-1, 101, 2**62))):
        for value in values:
            content = bytearray(pristine)
            content[offset : offset + 8] = np.array(value, dtype="<i8").tobytes()
            path.write_bytes(content)
            dataset = IndexedDataset(prefix)
            for method, arguments in (("document", (50,)), ("verify", ())):
                with pytest.raises(DataError, match=re.escape(f"{path}: ")):
                    getattr(dataset, method)(*arguments)

"""Shards of tokens in Megatron's MMIDIDX format (megatron/core/datasets/indexed_dataset.py), version 1.

`PREFIX.bin` holds the tokens of all documents one after another; `PREFIX.idx` says where each begins. The layout is
spelled out in csrc/indexed_dataset/builder.h, which writes it; this file reads it through a memory map."""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from illada_megatron.data.errors import DataError

try:
    from illada_megatron.data._indexed_dataset import IndexedDatasetBuilder
except ImportError as error:
    raise ImportError(
        "the C++ extension illada_megatron.data._indexed_dataset is not built: "
        "run `pip install -e .` or `python setup.py build_ext --inplace` in the repository"
    ) from error

Tokens = np.ndarray[Any, np.dtype[np.integer[Any]]]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Megatron's DType codes. Its other codes (8-bit, float) never hold token ids.
_TOKEN_DTYPES = {3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHECKED_AT_A_TIME = 1 << 20
_REWRITE = "write the shard again (illada preprocess), or copy both of its files again"


class IndexedDatasetWriter:
    """Writes one shard, in C++. The files get their names only when everything is on the device.

        with IndexedDatasetWriter("corpus/train", vocab_size=8000) as writer:
            writer.add(tokens, lengths)

    Leaving the block finishes the shard; leaving it by an exception removes what was written. An older shard of the
    same name is replaced at the end. Ids are stored as uint16 where vocab_size <= 65536, else as int32.

    Raises DataError for ids outside the vocabulary, for a shard without tokens, and when another process is writing
    the same prefix; OSError (with the path) for whatever the disk refuses."""

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = str(prefix)
        try:
            self._builder = IndexedDatasetBuilder(self.prefix, vocab_size)
        except BlockingIOError as error:
            raise DataError(
                f"{error.filename}: another process is writing this shard; wait for it or choose another prefix"
            ) from error
        except ValueError as error:
            raise DataError(str(error)) from error

    @property
    def num_tokens(self) -> int:
        return self._builder.num_tokens

    @property
    def num_documents(self) -> int:
        return self._builder.num_documents

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._builder.dtype)

    def add(self, tokens: Tokens, lengths: ArrayLike) -> None:
        """Append whole documents: tokens [n] (uint16, int32 or int64) one document after another, lengths
        [documents] in tokens, sum(lengths) == n. A batch that is refused leaves the shard as it was."""
        try:
            self._builder.add(tokens, lengths)
        except ValueError as error:
            raise DataError(str(error)) from error

    def finish(self) -> None:
        """Make PREFIX.bin and PREFIX.idx. Nothing can be added afterwards."""
        try:
            self._builder.finalize()
        except ValueError as error:
            raise DataError(str(error)) from error

    def abort(self) -> None:
        """Remove what was written so far."""
        self._builder.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()


class IndexedDataset:
    """A shard, memory-mapped and read-only: the flat stream of its tokens, and its documents.

    Opening checks both files against each other (one pass over the index), so a truncated copy or an index of
    another shard is an error here and not noise in a loss curve. Token values are not read: see `check_token_ids`.

    Attributes: prefix, dtype, num_tokens, num_documents, sequence_lengths [sequences] int32.

    Raises DataError naming the file, what was found and what was expected."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path = Path(self.prefix + ".bin")
        self.idx_path = Path(self.prefix + ".idx")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise DataError(
                    f"{path}: no such file; a shard is PREFIX.bin and PREFIX.idx, the .idx is written last: "
                    "finish writing it (illada preprocess), or correct the path"
                )
        self.dtype, num_sequences, num_bounds = self._read_header()
        self._map_index(num_sequences)
        self._check_index()
        self.num_tokens = self._num_tokens()
        self.num_documents = num_bounds - 1
        self._tokens: Tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r").view(np.ndarray)

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        """dtype, number of sequences, number of document bounds (documents + 1)."""
        with self.idx_path.open("rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise self._error(f"is {len(header)} bytes long", f"a header of {_HEADER.size} bytes")
        magic, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise self._error(f"starts with {magic!r}", f"{_MAGIC!r} (Megatron's MMIDIDX index)")
        if version != 1:
            raise self._error(f"has format version {version}", "1")
        if code not in _TOKEN_DTYPES:
            known = ", ".join(f"{known} ({np.dtype(name)})" for known, name in _TOKEN_DTYPES.items())
            raise self._error(f"has dtype code {code}", f"an integer type: {known}")
        if num_bounds < 1:
            raise self._error("has 0 document bounds", "the number of documents + 1")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        size = self.idx_path.stat().st_size
        if size == expected + num_sequences and num_sequences:
            raise self._error(
                "has a mode for each sequence (a multimodal index)", "none: multimodal data sets are not read"
            )
        if size != expected:
            raise self._error(
                f"is {size} bytes long",
                f"{expected} bytes for the {num_sequences} sequences and {num_bounds} document bounds it announces",
            )
        return np.dtype(_TOKEN_DTYPES[code]), num_sequences, num_bounds

    def _map_index(self, num_sequences: int) -> None:
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r").view(np.ndarray)
        lengths_end = _HEADER.size + 4 * num_sequences
        pointers_end = lengths_end + 8 * num_sequences
        self.sequence_lengths: Tokens = index[_HEADER.size : lengths_end].view("<i4")
        self._pointers: Tokens = index[lengths_end:pointers_end].view("<i8")
        self._bounds: Tokens = index[pointers_end:].view("<i8")

    def _check_index(self) -> None:
        """Lengths, byte offsets and document bounds have to tell one story. In pieces: an index can be gigabytes."""
        offset_bytes = 0
        for start in range(0, len(self.sequence_lengths), _CHECKED_AT_A_TIME):
            piece = slice(start, start + _CHECKED_AT_A_TIME)
            lengths = self.sequence_lengths[piece].astype(np.int64)
            if lengths.min() < 0:
                at = int(np.argmax(lengths < 0))
                raise self._error(f"gives sequence {start + at} the length {lengths[at]}", "0 or more tokens")
            ends = offset_bytes + np.cumsum(lengths) * self.dtype.itemsize
            expected = ends - lengths * self.dtype.itemsize
            wrong = self._pointers[piece] != expected
            if wrong.any():
                at = int(np.argmax(wrong))
                raise self._error(
                    f"places sequence {start + at} at byte {self._pointers[start + at]}",
                    f"byte {expected[at]}, where the sequences before it end",
                )
            offset_bytes = int(ends[-1])
        if self._bounds[0] != 0 or self._bounds[-1] != len(self.sequence_lengths):
            raise self._error(
                f"has documents from sequence {self._bounds[0]} to {self._bounds[-1]}",
                f"from 0 to {len(self.sequence_lengths)}, the number of sequences",
            )
        for start in range(0, len(self._bounds) - 1, _CHECKED_AT_A_TIME):
            steps = np.diff(self._bounds[start : start + _CHECKED_AT_A_TIME + 1])
            if steps.min() < 0:
                at = start + int(np.argmax(steps < 0))
                raise self._error(
                    f"ends document {at} at sequence {self._bounds[at + 1]}",
                    f"sequence {self._bounds[at]} (its start) or later",
                )

    def _num_tokens(self) -> int:
        """Tokens of the index, which the .bin has to hold exactly."""
        size = self.bin_path.stat().st_size
        expected = 0
        if len(self.sequence_lengths):
            expected = int(self._pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if size != expected:
            raise DataError(
                f"{self.bin_path}: is {size} bytes long, expected {expected} bytes for the "
                f"{expected // self.dtype.itemsize} {self.dtype} tokens that {self.idx_path} lists: {_REWRITE}"
            )
        if expected == 0:
            raise DataError(f"{self.bin_path}: the shard holds no tokens, expected at least 1: {_REWRITE}")
        return expected // self.dtype.itemsize

    def _error(self, found: str, expected: str) -> DataError:
        return DataError(f"{self.idx_path}: {found}, expected {expected}: {_REWRITE}")

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        # a process that is handed this object maps the files itself; a memory map would be copied as plain bytes
        return type(self), (os.path.abspath(self.prefix),)  # noqa: PTH100 (Path would eat a trailing dot segment)

    def __repr__(self) -> str:
        return f"IndexedDataset({self.prefix!r}: {self.num_documents} documents, {self.num_tokens} {self.dtype} tokens)"

    def read(self, start: int, length: int) -> Tokens:
        """Tokens [start, start + length) of the flat stream: a view of the map, [length] in the shard's dtype.

        Raises IndexError outside [0, num_tokens]."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(
                f"{self.prefix}: tokens {start} to {start + length} were asked for, it has {self.num_tokens}"
            )
        return self._tokens[start : start + length]

    def document(self, index: int) -> Tokens:
        """Tokens of document `index` in [0, num_documents), all its sequences together, end-of-document included."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: document {index} was asked for, it has {self.num_documents}")
        first, end = int(self._bounds[index]), int(self._bounds[index + 1])
        if first == end:
            return self._tokens[:0]
        start = int(self._pointers[first])
        last = int(self._pointers[end - 1]) // self.dtype.itemsize + int(self.sequence_lengths[end - 1])
        return self._tokens[start // self.dtype.itemsize : last]


def check_token_ids(tokens: Tokens, vocab_size: int, shard: str, offset: int) -> None:
    """Raise DataError when one of `tokens`, which start at token `offset` of `shard`, is not in [0, vocab_size)."""
    if not len(tokens) or (int(tokens.max()) < vocab_size and int(tokens.min()) >= 0):
        return
    at = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
    raise DataError(
        f"{shard}.bin: token id {int(tokens[at])} at token offset {offset + at} is not in the vocabulary of size "
        f"{vocab_size}: the shard was written with another tokenizer; set model.vocab_size to that tokenizer's size "
        "or preprocess the text again"
    )

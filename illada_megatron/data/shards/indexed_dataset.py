"""Shards of tokens in Megatron's MMIDIDX format (megatron/core/datasets/indexed_dataset.py), version 1.

`PREFIX.bin` holds the tokens of all documents one after another; `PREFIX.idx` says where each begins. The layout is
spelled out in csrc/indexed_dataset/builder.h. Reading, checking and writing are done in C++ (csrc/indexed_dataset/)."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import ArrayLike

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.durable import publish
from illada_megatron.system.whole_file import temporary_suffix

try:
    from illada_megatron.data.shards import _indexed_dataset
except ImportError as error:
    raise ImportError(
        "the C++ extension illada_megatron.data.shards._indexed_dataset is not built: "
        "run `pip install -e .` or `python setup.py build_ext --inplace` in the repository"
    ) from error

Tokens = np.ndarray[Any, np.dtype[np.integer[Any]]]
Progress = Callable[[int], object]
"""Is called now and then with the number of bytes that were done since the last call."""

_HEADER_BYTES = 34
# stays in a core's second-level cache while it is checked and hashed: a fifth faster than pieces of 8 MB
_PIECE_BYTES = 1 << 20
_CHECKED_AT_A_TIME = 1 << 20


class IndexedDatasetWriter:
    """Writes one shard, in C++. The files get their names only when everything is on the device.

        with IndexedDatasetWriter("corpus/train", vocab_size=8000) as writer:
            writer.add(tokens, lengths)

    Leaving the block finishes the shard; leaving it by an exception removes what was written. A shard of the same name
    is never replaced. Ids are stored as uint16 where vocab_size <= 65536, else as int32.

    Raises DataError for ids outside the vocabulary, for a shard without tokens, and, at the end, where there is another
    shard of this name; OSError (with the path) for whatever the disk refuses."""

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = str(prefix)
        self._suffix = temporary_suffix()
        self._builder = _indexed_dataset.IndexedDatasetBuilder(self.prefix, self._suffix, vocab_size)

    @property
    def num_tokens(self) -> int:
        return self._builder.num_tokens

    @property
    def num_documents(self) -> int:
        return self._builder.num_documents

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._builder.dtype)

    def add(self, tokens: Tokens, lengths: ArrayLike, end_token: int | None = None) -> None:
        """Append whole documents: tokens [n] (uint16, int32 or int64) one document after another, lengths
        [documents] in tokens, sum(lengths) == n. end_token: written behind each document, in addition to those.

        A batch that is refused leaves the shard as it was."""
        self._builder.add(tokens, lengths, end_token)

    def finish(self) -> None:
        """Make PREFIX.bin and PREFIX.idx. Nothing can be added afterwards."""
        self._builder.finalize()
        publish_shard(self.prefix, self._suffix)

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


def publish_shard(prefix: str, suffix: str) -> None:
    """Give PREFIX.bin and PREFIX.idx, which are complete with `suffix` behind them, their names: .bin first, .idx last,
    so that an .idx always stands beside its complete .bin, also after a power failure. Raises DataError where another
    shard has the name already; neither file is then left with the suffix."""
    paths = [Path(f"{prefix}{end}") for end in (".bin", ".idx")]
    try:
        for path in paths:
            publish(path.with_name(path.name + suffix), path)
    finally:
        for path in paths:
            path.with_name(path.name + suffix).unlink(missing_ok=True)


@dataclass(frozen=True)
class ShardChecksums:
    """XXH3-128 of both files, 32 hexadecimal digits each, as `manifest.file_checksum` computes them."""

    bin_xxh3_128: str
    idx_xxh3_128: str


class IndexedDataset:
    """A shard, memory-mapped and read-only: the flat stream of its tokens, and its documents.

    Opening takes the same time whatever the size. It finds a truncated file and an index of another shard; it does
    not read the tokens nor the index between its ends: `verify` does. What `document` meets there is checked when it
    meets it.

    A file that is truncated in place while it is open ends the process (SIGBUS); replacing it by renaming is safe.

    suffix: behind the names of its files, which have not got their names yet.

    Attributes: prefix, dtype, num_tokens, num_documents, sequence_lengths [sequences] int32.

    Raises DataError naming the file, what was found and what was expected."""

    def __init__(self, prefix: str | Path, suffix: str = "") -> None:
        self.prefix = str(prefix)
        self.bin_path = Path(f"{self.prefix}.bin{suffix}")
        self.idx_path = Path(f"{self.prefix}.idx{suffix}")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise DataError(
                    f"{path}: no such file; a shard is PREFIX.bin and PREFIX.idx, the .idx is written last: "
                    "finish writing it (illada preprocess), or correct the path"
                )
        self._index = _indexed_dataset.IndexFile(str(self.idx_path), str(self.bin_path))
        self.dtype = np.dtype(self._index.dtype)
        self.num_tokens = self._index.num_tokens
        self.num_documents = self._index.num_documents
        self._tokens: Tokens = np.memmap(self.bin_path, self.dtype, "r", shape=(self.num_tokens,)).view(np.ndarray)

    @cached_property
    def sequence_lengths(self) -> Tokens:
        """Tokens of each sequence (a document may have several): a view of the map, int32 [sequences]."""
        shape = (self._index.num_sequences,)
        return np.memmap(self.idx_path, np.dtype("<i4"), "r", offset=_HEADER_BYTES, shape=shape).view(np.ndarray)

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
        start, end = self._index.document(index)
        return self._tokens[start:end]

    def document_lengths(self, begin: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each of documents [begin, end): int64 [end - begin], the caller's own."""
        return self._index.document_lengths(begin, end)

    def verify(self, vocab_size: int | None = None, progress: Progress | None = None) -> ShardChecksums:
        """Check every entry of the index and, given vocab_size, every token; in one pass over each file, with
        memory for a piece. Returns the checksums of what was checked.

        progress: see `Progress`; `verified_bytes` is the total. Raises DataError at the first thing that is wrong."""
        report = progress or (lambda _: None)
        entries = max(self._index.num_sequences, self.num_documents)
        for begin in range(0, entries, _CHECKED_AT_A_TIME):
            self._index.check(begin, begin + _CHECKED_AT_A_TIME)
        idx_checksum = xxhash.xxh3_128()
        for piece in _pieces(self.idx_path, self.idx_path.stat().st_size):
            idx_checksum.update(piece)
            report(len(piece))
        bin_checksum, offset = xxhash.xxh3_128(), 0
        for piece in _pieces(self.bin_path, self.num_tokens * self.dtype.itemsize):
            if vocab_size is not None:
                tokens = np.frombuffer(piece, dtype=self.dtype)
                check_token_ids(tokens, vocab_size, self.prefix, offset)
                offset += len(tokens)
            bin_checksum.update(piece)
            report(len(piece))
        return ShardChecksums(bin_checksum.hexdigest(), idx_checksum.hexdigest())

    @property
    def verified_bytes(self) -> int:
        """What `verify` reports in all."""
        return self.idx_path.stat().st_size + self.num_tokens * self.dtype.itemsize


def _pieces(path: Path, size: int) -> Iterator[memoryview]:
    """The `size` bytes of a file, a piece at a time in one buffer: each is valid until the next is asked for."""
    buffer = memoryview(bytearray(min(size, _PIECE_BYTES)))
    done = 0
    with path.open("rb", buffering=0) as stream:
        while done < size:
            filled = 0
            # whole pieces, so that no token is cut in two
            while filled < min(len(buffer), size - done):
                count = stream.readinto(buffer[filled : size - done])
                if not count:
                    raise DataError(f"{path}: ends at byte {done + filled}, expected {size} bytes: it was truncated")
                filled += count
            done += filled
            yield buffer[:filled]


def check_token_ids(tokens: Tokens, vocab_size: int, shard: str, offset: int) -> None:
    """Raise DataError when one of `tokens`, which start at token `offset` of `shard`, is not in [0, vocab_size)."""
    _indexed_dataset.check_token_ids(tokens, vocab_size, f"{shard}.bin", offset)

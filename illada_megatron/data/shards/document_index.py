"""Where the documents of a shard begin, from a few small pieces of its `.idx`, on a disk or in object storage.

The arrays of an index ascend nearly as a straight line does: where a value stands is guessed between two known entries,
the piece around the guess is read, and the answer is in it, or in the next. That is one or two reads for an index of
any size, where halving takes one for each doubling (26 for 47 million documents). Nothing is mapped, so that an I/O
error is an exception; of files that are read a bounded number stays open, as opening is what a network file system is
slow at."""

import errno
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards._indexed_dataset import OpenFile, open_files_limit

Result = TypeVar("Result")
Read = Callable[[int, int], bytes]
"""read(offset, length): these bytes of the file."""

_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {"int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_PIECE_ENTRIES = 1 << 12
_REWRITE = "write the shard again (illada preprocess), or copy both of its files again"


class SizedShard(Protocol):
    """What is known of a shard before it is opened."""

    @property
    def prefix(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class _Array:
    """`count` ascending int64 from 0 to `last` that lie at `offset`."""

    name: str
    offset: int
    count: int
    last: int


class DocumentIndex:
    """The `.idx` of a shard (its layout: csrc/indexed_dataset/builder.h), of `size` bytes, through `read`. It remembers
    what it has read: one is made for a window or two.

    What is read is checked: no content leads outside of the file or to an endless search. What is not read is not.

    Raises DataError naming the file, what was found and what was expected."""

    def __init__(self, shard: SizedShard, size: int, read: Read) -> None:
        self._path = shard.prefix + ".idx"
        self._read = read
        self._token_bytes = np.dtype(shard.dtype).itemsize
        if size < _HEADER.size:
            raise self._error(f"is {size} bytes long", f"a header of {_HEADER.size} bytes")
        magic, version, code, sequences, bounds = _HEADER.unpack(read(0, _HEADER.size))
        if magic != b"MMIDIDX\0\0" or version != 1:
            raise self._error(f"starts with {magic!r}, version {version}", "Megatron's MMIDIDX index of version 1")
        if code != _DTYPE_CODES[shard.dtype]:
            raise self._error(f"has dtype code {code}", f"{_DTYPE_CODES[shard.dtype]} ({shard.dtype}) as was listed")
        if size != _HEADER.size + 12 * sequences + 8 * bounds or not sequences or not bounds:
            raise self._error(
                f"is {size} bytes long",
                f"{_HEADER.size + 12 * sequences + 8 * bounds} bytes for the {sequences} sequences and {bounds} "
                "document bounds it announces, at least one of each",
            )
        self._pieces: dict[tuple[str, int], NDArray[np.int64]] = {}
        pointers_at = _HEADER.size + 4 * sequences
        self._pointers = _Array("pointer", pointers_at, sequences, shard.tokens * self._token_bytes)
        self._bounds = _Array("bound", pointers_at + 8 * sequences, bounds, sequences)

    def require_end(self, tokens: int) -> None:
        """Raise DataError unless the last sequence ends where `tokens` do: the index of another version of the shard.
        Two reads."""
        last = self._pointers.count - 1
        (length,) = struct.unpack("<i", self._read(_HEADER.size + 4 * last, 4))
        (pointer,) = struct.unpack("<q", self._read(self._pointers.offset + 8 * last, 8))
        found = (pointer + length * self._token_bytes) // self._token_bytes
        if found != tokens:
            raise DataError(
                f"{self._path}: lists {found} tokens, expected {tokens} as the manifest says: copy the shard again, or "
                "write the manifest anew"
            )

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token offsets, ascending and each once, at which documents begin strictly inside (start, stop)."""
        first = self._find(self._pointers, start * self._token_bytes + 1)
        end = self._find(self._pointers, stop * self._token_bytes)
        if first >= end:
            return np.empty(0, np.int64)
        begin = self._find(self._bounds, first)
        sequences = self._entries(self._bounds, begin, max(begin, self._find(self._bounds, end)))
        # a document of several sequences begins with one of them, empty ones where the next does
        pointers = self._entries(self._pointers, first, end)[sequences - first]
        if (pointers % self._token_bytes).any():
            raise self._error("places a sequence inside a token", f"multiples of {self._token_bytes} bytes")
        return np.unique(pointers // self._token_bytes)

    def document_at(self, token: int) -> int:
        """The document that the token at this offset belongs to."""
        sequence = self._find(self._pointers, token * self._token_bytes + 1)
        return max(self._find(self._bounds, sequence) - 1, 0)

    def _find(self, array: _Array, value: int) -> int:
        """The first place in `array` whose entry is at least `value`; its length where there is none."""
        low, high, below, above = 0, array.count, 0, array.last
        attempt = 0
        while low < high:
            attempt += 1
            # each third time by halving: an index that is no straight line is not read from end to end
            share = (min(max(value, below), above) - below, above - below) if attempt % 3 and above > below else (1, 2)
            number = min(low + (high - low) * share[0] // share[1], high - 1) // _PIECE_ENTRIES
            entries = self._piece(array, number)
            begin = number * _PIECE_ENTRIES
            place = begin + int(entries.searchsorted(value))
            if begin < place < begin + len(entries):
                return place
            if place == begin:
                high, above = begin, int(entries[0])
            else:
                low, below = place, int(entries[-1])
        return low

    def _entries(self, array: _Array, begin: int, end: int) -> NDArray[np.int64]:
        """Entries [begin, end)."""
        first, last = begin // _PIECE_ENTRIES, max(begin, end - 1) // _PIECE_ENTRIES
        entries = self._piece(array, first)
        if last > first:
            entries = np.concatenate([entries, *(self._piece(array, number) for number in range(first + 1, last + 1))])
            if _descends(entries):
                raise self._error(f"has {array.name}s that descend behind number {begin}", "ascending ones")
        return entries[begin - first * _PIECE_ENTRIES : end - first * _PIECE_ENTRIES]

    def _piece(self, array: _Array, number: int) -> NDArray[np.int64]:
        if (known := self._pieces.get((array.name, number))) is not None:
            return known
        begin = number * _PIECE_ENTRIES
        count = min(_PIECE_ENTRIES, array.count - begin)
        entries = np.frombuffer(self._read(array.offset + 8 * begin, 8 * count), dtype="<i8")
        if entries[0] < 0 or entries[-1] > array.last or _descends(entries):
            wrong = np.flatnonzero((np.diff(entries, prepend=0) < 0) | (entries < 0) | (entries > array.last))
            raise self._error(
                f"has {array.name} {begin + wrong[0]} at {entries[wrong[0]]}", f"0 to {array.last}, ascending"
            )
        self._pieces[array.name, number] = entries
        return entries

    def _error(self, found: str, expected: str) -> DataError:
        return DataError(f"{self._path}: {found}, expected {expected}: {_REWRITE}")


def _descends(entries: NDArray[np.int64]) -> bool:
    return bool((entries[1:] < entries[:-1]).any())


@contextmanager
def open_document_index(shard: SizedShard) -> Iterator[DocumentIndex]:
    """The index of a shard on a disk, open inside the block. The files last used stay open behind it, as many as
    TokenReaders keep; an error closes them all: whoever tries again opens them anew.

    Raises DataError: as `DocumentIndex`, no such file, an index of another number of tokens. OSError."""
    try:
        file, header = _opened(shard)
        yield DocumentIndex(shard, file.size_bytes, lambda at, count: file.read(at, count) if at else header)
    except (DataError, OSError):
        close_document_indexes()
        raise


def close_document_indexes() -> None:
    """All that stay open, but those in use."""
    _opened.cache_clear()


def with_descriptors(call: Callable[[], Result]) -> Result:
    """call(); where the process has no descriptor left, once more without those of the indexes."""
    try:
        return call()
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
    close_document_indexes()
    return call()


@lru_cache(maxsize=open_files_limit())
def _opened(shard: SizedShard) -> tuple[OpenFile, bytes]:
    """The index and its header, checked."""
    path = shard.prefix + ".idx"
    try:
        file = with_descriptors(lambda: OpenFile(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; a shard is PREFIX.bin and PREFIX.idx, the .idx is written last: finish writing it "
            "(illada preprocess), or correct the path"
        ) from error
    DocumentIndex(shard, file.size_bytes, file.read).require_end(shard.tokens)
    return file, file.read(0, _HEADER.size)

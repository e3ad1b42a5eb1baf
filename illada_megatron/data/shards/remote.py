"""Shards in object storage (`s3://bucket/…`), read by byte ranges through obstore. Nothing is copied to a disk.

Credentials, region and endpoint come from the environment as for other S3 clients (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; AWS_ALLOW_HTTP=true for an endpoint without TLS)."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import check_token_ids

_SCHEMES = ("s3://",)
_HEADER_BYTES = 34
# Pieces of an index: a binary search over 10^9 documents touches about ten, and the first few are always the same.
_PIECE_BYTES = 1 << 17
_KEPT_PIECES = 256


class StoredShard(Protocol):
    """What is known of a shard before it is opened."""

    @property
    def prefix(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def tokens(self) -> int: ...


def is_remote(path: str) -> bool:
    return path.startswith(_SCHEMES)


def read_object(url: str) -> bytes:
    """A whole object. Raises DataError when it cannot be read."""
    store, key = _store_and_key(url)
    import obstore

    with _errors(url, obstore):
        return bytes(obstore.get(store, key).bytes())


class RemoteReader:
    """Tokens of shards in object storage; the counterpart of the C++ TokenReader for local files. Thread-safe."""

    def __init__(self, shards: Sequence[StoredShard]) -> None:
        self._shards = shards
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)

    def read(self, starts: NDArray[np.int64], out: NDArray[Any], vocab_size: int) -> None:
        """Fill row r of `out` [b, length] with the stream's tokens from starts[r] on.

        Raises DataError for a token outside [0, vocab_size) and for objects that cannot be read."""
        length = out.shape[1]
        for start, row in zip(starts.tolist(), out, strict=True):
            filled = 0
            shard = int(np.searchsorted(self._ends, start, side="right"))
            while filled < length:
                entry = self._shards[shard]
                offset = start + filled - int(self._ends[shard]) + entry.tokens
                count = min(length - filled, entry.tokens - offset)
                tokens = self._read_tokens(entry, offset, count)
                check_token_ids(tokens, vocab_size, entry.prefix, offset)
                row[filled : filled + count] = tokens
                filled += count
                shard += 1

    def _read_tokens(self, shard: StoredShard, offset: int, count: int) -> NDArray[Any]:
        dtype = np.dtype(shard.dtype)
        url = shard.prefix + ".bin"
        _require_size(url, shard.tokens * dtype.itemsize)
        return np.frombuffer(read_range(url, offset * dtype.itemsize, count * dtype.itemsize), dtype=dtype)


class RemoteIndex:
    """The document starts of one shard's `.idx` in object storage, by binary search in pieces of it."""

    def __init__(self, shard: StoredShard) -> None:
        self._url = shard.prefix + ".idx"
        self._itemsize = np.dtype(shard.dtype).itemsize
        self._tokens = shard.tokens
        header = read_range(self._url, 0, _HEADER_BYTES)
        self._sequences, bounds = (int(value) for value in np.frombuffer(header[18:34], dtype="<u8"))
        if header[:9] != b"MMIDIDX\0\0" or bounds < 1:
            raise DataError(f"{self._url}: starts with {header[:9]!r}, expected Megatron's MMIDIDX index")
        self._documents = bounds - 1
        self._pointers_at = _HEADER_BYTES + 4 * self._sequences
        self._bounds_at = self._pointers_at + 8 * self._sequences
        _require_size(self._url, self._bounds_at + 8 * bounds)
        self._piece = lru_cache(maxsize=_KEPT_PIECES)(self._read_piece)
        self._size = self._bounds_at + 8 * bounds

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token offsets in (start, stop) of this shard at which documents begin, ascending."""
        first = self._first_document_after(start)
        found: list[int] = []
        for document in range(first, self._documents):
            offset = self._start(document)
            if offset >= stop:
                break
            if offset > start and (not found or offset > found[-1]):
                found.append(offset)
        return np.array(found, dtype=np.int64)

    def document_at(self, token: int) -> int:
        """The document that the token at this offset belongs to."""
        return self._first_document_after(token) - 1

    def _first_document_after(self, token: int) -> int:
        low, high = 0, self._documents
        while low < high:
            middle = (low + high) // 2
            if self._start(middle) > token:
                high = middle
            else:
                low = middle + 1
        return low

    def _start(self, document: int) -> int:
        """Token offset of a document; the shard's end for an empty one behind the last sequence."""
        sequence = self._value(self._bounds_at + 8 * document)
        if sequence == self._sequences:
            return self._tokens
        if not 0 <= sequence < self._sequences:
            raise DataError(f"{self._url}: document {document} begins at sequence {sequence} of {self._sequences}")
        pointer = self._value(self._pointers_at + 8 * sequence)
        if not 0 <= pointer <= self._tokens * self._itemsize:
            raise DataError(f"{self._url}: sequence {sequence} is placed at byte {pointer}, beyond the .bin")
        return pointer // self._itemsize

    def _value(self, offset: int) -> int:
        piece, inside = divmod(offset, _PIECE_BYTES)
        raw = self._piece(piece)[inside : inside + 8]
        if len(raw) < 8:  # the header is not a multiple of 8 bytes: a value may lie across two pieces
            raw += self._piece(piece + 1)[: 8 - len(raw)]
        return int.from_bytes(raw, "little", signed=True)

    def _read_piece(self, piece: int) -> bytes:
        start = piece * _PIECE_BYTES
        return read_range(self._url, start, min(_PIECE_BYTES, self._size - start))


def read_range(url: str, start: int, length: int) -> bytes:
    """`length` bytes of an object from `start` on. Raises DataError when they cannot be read."""
    store, key = _store_and_key(url)
    import obstore

    with _errors(url, obstore):
        content = bytes(obstore.get_range(store, key, start=start, length=length))
    if len(content) != length:
        raise DataError(f"{url}: {len(content)} bytes were sent from byte {start} on, expected {length}")
    return content


@lru_cache(maxsize=1 << 16)
def _size(url: str) -> int:
    store, key = _store_and_key(url)
    import obstore

    with _errors(url, obstore):
        return int(obstore.head(store, key)["size"])


def _require_size(url: str, expected: int) -> None:
    if (size := _size(url)) != expected:
        raise DataError(
            f"{url}: is {size} bytes long, expected {expected} as the manifest says: copy the shard again, or write "
            "the manifest anew"
        )


_stores: dict[str, Any] = {}
_stores_lock = threading.Lock()


def _store_and_key(url: str) -> tuple[Any, str]:
    """One client a bucket and process; it is thread-safe and keeps its connections."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise DataError(f"{url}: reading it needs the package obstore: pip install 'illada-megatron[s3]'") from error
    with _stores_lock:
        if bucket not in _stores:
            _stores[bucket] = from_url(f"{scheme}://{bucket}")
        return _stores[bucket], key


@contextmanager
def _errors(url: str, library: Any) -> Iterator[None]:
    """The library's errors as DataError with the URL."""
    try:
        yield
    except (library.exceptions.BaseError, OSError) as error:
        raise DataError(
            f"{url}: cannot be read from object storage ({type(error).__name__}: {str(error)[:300]}): check the URL, "
            "AWS_REGION, AWS_ENDPOINT_URL and the credentials"
        ) from error

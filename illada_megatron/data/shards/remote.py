"""Shards in object storage (`s3://bucket/…`), read by byte ranges through obstore. Nothing is copied to a disk.

Credentials, region and endpoint come from the environment as for other S3 clients (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; AWS_ALLOW_HTTP=true for an endpoint without TLS)."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.document_index import DocumentIndex, SizedShard
from illada_megatron.data.shards.indexed_dataset import check_token_ids

_SCHEMES = ("s3://",)
_HEADER_BYTES = 34
# What the process keeps of indexes: pieces of 32 KB, 64 MB in all, in which a corpus of few shards is soon looked up
# alone, and of more shards the headers, some hundred bytes each.
_KEPT_PIECES = 1 << 11
_KEPT_HEADERS = 1 << 17


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

    def __init__(self, shards: Sequence[SizedShard]) -> None:
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

    def _read_tokens(self, shard: SizedShard, offset: int, count: int) -> NDArray[Any]:
        dtype = np.dtype(shard.dtype)
        expected = shard.tokens * dtype.itemsize
        part = _read_range(
            shard.prefix + ".bin", offset * dtype.itemsize, count * dtype.itemsize, expected_size=expected
        )
        return np.frombuffer(part.content, dtype=dtype)


class _Part(NamedTuple):
    """Bytes of an object, the size of the whole, and its ETag (None: the server gives none)."""

    content: bytes
    size: int
    version: str | None


def open_remote_index(shard: SizedShard) -> DocumentIndex:
    """The index of a shard in object storage: three requests when it is first opened.

    Raises DataError: as `DocumentIndex`, an index of another number of tokens, an object that was replaced since."""
    return _index(shard, _header(shard), _piece)


def _index(shard: SizedShard, header: _Part, piece: Callable[[str, str | None, int, int], bytes]) -> DocumentIndex:
    url = shard.prefix + ".idx"
    return DocumentIndex(
        shard, header.size, lambda at, count: piece(url, header.version, at, count) if at else header.content
    )


@lru_cache(maxsize=_KEPT_HEADERS)
def _header(shard: SizedShard) -> _Part:
    header = _read_range(shard.prefix + ".idx", 0, _HEADER_BYTES)
    _index(shard, header, _read_piece).require_end(shard.tokens)
    return header


def _read_piece(url: str, version: str | None, offset: int, length: int) -> bytes:
    """A piece of the object whose header had this ETag."""
    part = _read_range(url, offset, length)
    if part.version != version:
        raise DataError(
            f"{url}: has ETag {part.version} at byte {offset}, expected {version} as at its beginning: it was replaced "
            "while it was read; start the run again, and give new shards names of their own"
        )
    return part.content


_piece = lru_cache(maxsize=_KEPT_PIECES)(_read_piece)


def _read_range(url: str, start: int, length: int, expected_size: int | None = None) -> _Part:
    """`length` bytes of an object from `start` on: one request.

    Raises DataError when they cannot be read, or the object is not of the expected size."""
    store, key = _store_and_key(url)
    import obstore

    with _errors(url, obstore):
        try:
            result = obstore.get(store, key, options={"range": (start, start + length)})
        except obstore.exceptions.BaseError:
            # beyond the end of an object that is too short: its size says more than "range not satisfiable"
            _require_size(url, int(obstore.head(store, key)["size"]), expected_size)
            raise
        part = _Part(bytes(result.bytes()), int(result.meta["size"]), result.meta["e_tag"])
    _require_size(url, part.size, expected_size)
    if len(part.content) != length:
        raise DataError(f"{url}: {len(part.content)} bytes were sent from byte {start} on, expected {length}")
    return part


def _require_size(url: str, size: int, expected: int | None) -> None:
    if expected is not None and size != expected:
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

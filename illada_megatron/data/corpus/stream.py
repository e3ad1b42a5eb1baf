"""The tokens of all shards of a corpus as one stream, wherever the shards are."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards._indexed_dataset import TokenReader
from illada_megatron.data.shards.document_index import DocumentIndex, open_document_index, with_descriptors
from illada_megatron.data.shards.remote import RemoteReader, is_remote, open_remote_index
from illada_megatron.data.shards.shard_list import Shard


@dataclass(frozen=True)
class Piece:
    """Tokens of one shard that follow each other."""

    prefix: str
    first_token: int
    end_token: int
    """Tokens [first_token, end_token) of the shard."""
    first_document: int
    last_document: int
    """Which documents of the shard they belong to, counted from 0."""


class TokenStream:
    """Concatenation of shards. Nothing is opened here: a shard's files are when they are first read.

    Local shards are read by the C++ TokenReader (through maps where the corpus is small), those in object storage by
    byte ranges. Any number of threads may read at once.

    Raises DataError when local and remote shards are mixed."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._starts = np.cumsum([0] + [shard.tokens for shard in self.shards], dtype=np.int64)
        self.num_tokens = int(self._starts[-1])
        remote = {is_remote(shard.prefix) for shard in self.shards}
        if len(remote) > 1:
            raise DataError(
                f"{self.shards[0].prefix} and others: local shards and shards in object storage are mixed in one "
                "corpus, expected one kind: make two corpora of it (data.blend)"
            )
        self._is_remote = True in remote
        self._reader: Any = RemoteReader(self.shards) if self._is_remote else _local_reader(self.shards)

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Shard, ...]]]:
        # another process opens the files itself
        return type(self), (self.shards,)

    def read(self, starts: NDArray[np.int64], out: NDArray[Any], vocab_size: int) -> None:
        """Fill row r of `out` [b, length] (C-contiguous, int64 or int32) with the tokens from starts[r] on.

        Raises DataError naming shard and offset: an id outside [0, vocab_size), a file that is not as long as it was
        said to be, one that cannot be opened."""
        try:
            with_descriptors(lambda: self._reader.read(starts, out, vocab_size))
        except ValueError as error:
            raise DataError(str(error)) from error

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Stream offsets in (start, stop) at which documents begin, ascending; a shard's beginning is one."""
        found: list[int] = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while shard < len(self.shards) and self._starts[shard] < stop:
            offset = int(self._starts[shard])
            if offset > start:
                found.append(offset)
            with self._index(shard) as index:
                inside = index.document_starts(max(start - offset, 0), min(stop - offset, self._length(shard)))
            found += (inside + offset).tolist()
            shard += 1
        return np.array(found, dtype=np.int64)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Where the tokens [start, stop) lie, shard by shard."""
        found: list[Piece] = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            inside = start - int(self._starts[shard])
            end = min(stop - int(self._starts[shard]), self._length(shard))
            if end > inside:
                with self._index(shard) as index:
                    documents = index.document_at(inside), index.document_at(end - 1)
                found.append(Piece(self.shards[shard].prefix, inside, end, *documents))
            start, shard = int(self._starts[shard]) + max(inside, end), shard + 1
        return found

    def in_shards(self, offset: int) -> int:
        """The offset among all the shards' tokens."""
        return offset

    def _length(self, shard: int) -> int:
        return self.shards[shard].tokens

    def _index(self, shard: int) -> AbstractContextManager[DocumentIndex]:
        one = self.shards[shard]
        return nullcontext(open_remote_index(one)) if self._is_remote else open_document_index(one)


def _local_reader(shards: Sequence[Shard]) -> TokenReader:
    return TokenReader(
        [shard.prefix + ".bin" for shard in shards],
        [shard.dtype for shard in shards],
        [shard.tokens for shard in shards],
    )

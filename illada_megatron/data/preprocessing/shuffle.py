"""Documents of a shard in another order, within a bounded buffer of tokens."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from illada_megatron.data.corpus.order import derive_key
from illada_megatron.data.errors import DataError

Tokens = np.ndarray[Any, np.dtype[np.integer[Any]]]
Lengths = np.ndarray[Any, np.dtype[np.int64]]

# tokens that are gathered at a time: their indices take 8 bytes each
_GATHERED_TOKENS = 1 << 18


class DocumentShuffle:
    """Random documents, half of a full buffer's tokens, go out; the others stay to mix with what comes next.

    The order is a pure function of (seed, shard, the documents and how they are batched): Philox keyed by the three,
    its random_raw, whose stream numpy promises to keep."""

    def __init__(self, seed: int, shard: tuple[int, int], buffer_bytes: int, vocab_size: int) -> None:
        """buffer_bytes: in all, of which half holds tokens and half their copy in another order."""
        self._philox = np.random.Philox(key=derive_key(seed, "documents", *shard))
        self._vocab_size = vocab_size
        self._dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self._buffer_tokens = max(1, buffer_bytes // (2 * self._dtype.itemsize))
        self._batches: list[tuple[Tokens, Lengths]] = []
        self._held = 0

    def add(self, tokens: Tokens, lengths: Lengths) -> Iterator[tuple[Tokens, Lengths]]:
        """Take in documents [documents] of tokens [n], give out others. Raises DataError for ids outside the
        vocabulary, which would not survive here for the writer to find."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise DataError(
                f"the tokenizer gave ids from {tokens.min()} to {tokens.max()}, expected 0 to {self._vocab_size - 1}: "
                "use another --tokenizer-engine"
            )
        self._batches.append((tokens.astype(self._dtype), lengths))
        self._held += len(tokens)
        if self._held >= self._buffer_tokens:
            yield from self._give(half=True)

    def finish(self) -> Iterator[tuple[Tokens, Lengths]]:
        """Give out what is left."""
        if self._batches:
            yield from self._give(half=False)

    def _give(self, half: bool) -> Iterator[tuple[Tokens, Lengths]]:
        tokens = np.concatenate([tokens for tokens, _ in self._batches])
        lengths = np.concatenate([lengths for _, lengths in self._batches])
        self._batches = []
        order = np.argsort(self._philox.random_raw(len(lengths)), kind="stable")
        starts = np.cumsum(lengths) - lengths
        count = len(order)
        if half:
            count = min(count, int(np.searchsorted(np.cumsum(lengths[order]), len(tokens) / 2)) + 1)
        yield from _gather(tokens, starts, lengths, order[:count])
        self._batches = list(_gather(tokens, starts, lengths, np.sort(order[count:])))
        self._held = sum(len(kept) for kept, _ in self._batches)


def _gather(tokens: Tokens, starts: Lengths, lengths: Lengths, order: Lengths) -> Iterator[tuple[Tokens, Lengths]]:
    """The documents `order`, some at a time."""
    ends = np.cumsum(lengths[order])
    first = 0
    while first < len(order):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _GATHERED_TOKENS, side="right")))
        chosen = lengths[order[first:last]]
        begins = np.cumsum(chosen) - chosen
        index = np.arange(int(chosen.sum())) + np.repeat(starts[order[first:last]] - begins, chosen)
        yield tokens[index], chosen
        first = last

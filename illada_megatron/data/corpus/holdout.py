"""What is held out of a corpus: ranges spread evenly over its tokens; the rest, joined, is trained on.

A corpus is often sorted by source: its tail would be one of them. The tokens are cut into equal parts, and the middle
of each is held out, wherever documents and shards begin. The ranges are long where enough is held out: of a document
that a range cuts the rest is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from illada_megatron.data.corpus.stream import Piece, TokenStream
from illada_megatron.data.errors import DataError

_MOST_RANGES = 1024
_FEWEST_RANGES = 16
_LONG_RANGE_TOKENS = 1 << 16


@dataclass(frozen=True)
class HeldOutRanges:
    """`count` ranges of `length` tokens each of a stream of `num_tokens`. Range r stands in the middle of the r-th of
    `count` equal parts of the tokens that are left."""

    num_tokens: int
    count: int
    length: int

    def first(self, number: int) -> int:
        """Stream offset of a range; of range `count`: the end of the stream."""
        left = self.num_tokens - self.count * self.length
        before = left if number == self.count else (2 * number + 1) * left // (2 * self.count)
        return before + number * self.length

    def text(self) -> str:
        """For people, and for fingerprints."""
        return f"{self.count} ranges of {self.length} tokens, spread evenly"

    def training(self) -> list[tuple[int, int]]:
        """What is left, [first, end) each, in order."""
        ends = [0, *(self.first(number) + self.length for number in range(self.count))]
        return [(end, self.first(number)) for number, end in enumerate(ends)]

    def windows(self, sequence_length: int) -> list[tuple[int, int]]:
        """The whole windows of each range, [first, end) each, in order."""
        whole = self.length // sequence_length * sequence_length
        return [(self.first(number), self.first(number) + whole) for number in range(self.count)]


def held_out_ranges(num_tokens: int, sequence_length: int, holdout_tokens: int) -> HeldOutRanges:
    """Where `holdout_tokens` of a stream (fewer by less than one for each range) are: 16 to 1,024 ranges, of 65,536
    tokens or more where that many are held out, and of one window at least. So, from a million tokens on, they are the
    same for all sequence lengths up to 65,536.

    Raises DataError for fewer tokens than one window, and for more than there are."""
    if not sequence_length <= holdout_tokens <= num_tokens:
        raise DataError(
            f"data.holdout_tokens is {holdout_tokens}, expected at least one window of {sequence_length} tokens "
            f"(data.sequence_length) and at most the {num_tokens} of each corpus: change it, or name held-out shards "
            "in data.validation_paths"
        )
    wanted = min(max(holdout_tokens // _LONG_RANGE_TOKENS, _FEWEST_RANGES), _MOST_RANGES)
    count = min(wanted, holdout_tokens // sequence_length)
    return HeldOutRanges(num_tokens, count, holdout_tokens // count)


class JoinedStretches:
    """Stretches of a stream as one stream. The interface of `TokenStream`; there are 1,025 at most, so that a window
    costs a look-up more than it does there, and one read more for each place where two stretches meet in it."""

    def __init__(self, stream: TokenStream, stretches: Sequence[tuple[int, int]]) -> None:
        """stretches: [first, end) of `stream`, in order."""
        self._stream = stream
        firsts, ends = (np.array(side, dtype=np.int64) for side in zip(*stretches, strict=True))
        self._starts = np.concatenate([[0], np.cumsum(ends - firsts)])
        self._shifts = firsts - self._starts[:-1]
        self.num_tokens = int(self._starts[-1])

    def read(self, starts: NDArray[np.int64], out: NDArray[Any], vocab_size: int) -> None:
        """As `TokenStream.read`."""
        length = out.shape[1]
        following = self._starts.searchsorted(starts, side="right")
        if (self._starts[following] - starts).min(initial=length) >= length:
            self._stream.read(starts + self._shifts[following - 1], out, vocab_size)
            return
        for row, start in enumerate(starts.tolist()):
            for joined, first, count in self._parts(start, start + length):
                part = out[row : row + 1, joined - start : joined - start + count]
                self._stream.read(np.array([first], dtype=np.int64), part, vocab_size)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """As `TokenStream.document_starts`; where two stretches meet, one begins."""
        found: list[int] = []
        for joined, first, count in self._parts(start, stop):
            if joined > start:
                found.append(joined)
            found += (self._stream.document_starts(first, first + count) - first + joined).tolist()
        return np.array(found, dtype=np.int64)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """As `TokenStream.pieces`."""
        parts = self._parts(start, stop)
        return [piece for _, first, count in parts for piece in self._stream.pieces(first, first + count)]

    def in_shards(self, offset: int) -> int:
        """As `TokenStream.in_shards`."""
        return self._parts(offset, offset + 1)[0][1]

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """What [start, stop) is made of: (its offset here, in the stream, number of tokens) of each stretch's part."""
        parts = []
        while start < stop:
            stretch = int(np.searchsorted(self._starts, start, side="right")) - 1
            end = min(stop, int(self._starts[stretch + 1]))
            parts.append((start, start + int(self._shifts[stretch]), end - start))
            start = end
        return parts

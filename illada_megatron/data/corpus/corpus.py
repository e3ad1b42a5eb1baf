"""A corpus as training sees it: an endless list of samples, any of which can be computed from its index alone."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from illada_megatron.data.corpus.holdout import JoinedStretches, held_out_ranges
from illada_megatron.data.corpus.order import derive_key, permute
from illada_megatron.data.corpus.stream import Piece, TokenStream
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.shard_list import ShardList, list_shards


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from."""

    corpus: str
    """Its name; "" where there is one."""
    index: int
    """Among the samples of that corpus."""
    epoch: int
    position: int
    """In the order of that epoch, of `num_windows`."""
    num_windows: int
    pieces: list[Piece]


class Corpus:
    """Windows of `sequence_length` tokens from the concatenated shards, epoch after epoch.

    The shards' tokens form one stream (windows run across documents and shards). Each epoch cuts it into
    `num_windows` windows, the first beginning at the epoch's phase, a draw from [0, sequence_length): the tokens
    left over at the two ends, less than two windows, differ from epoch to epoch. The windows come in an order that
    is another permutation each epoch.

    Sample i is a pure function of (tokens, sequence_length, seed, name, i); how the tokens are split into shards plays
    no part. There is no state and no array as long as the epoch: a sample costs O(log shards) and its own tokens.

    paths: manifests, prefixes or globs of prefixes (see `list_shards`), or their list.
    shuffle: False reads the windows in stream order from phase 0 in every epoch (validation).
    vocab_size: an id outside [0, vocab_size) is an error that names its shard and offset.
    name: tells corpora of one blend apart; their orders are unrelated.
    holdout_tokens, part: so many tokens, in ranges spread evenly over the stream (`held_out_ranges`), are held out. The
        training part is the rest, joined; the validation part the whole windows of each range. The two share no token.

    Raises DataError for unusable shards or fewer tokens than one window."""

    def __init__(
        self,
        paths: Sequence[str | Path] | ShardList,
        sequence_length: int,
        seed: int,
        shuffle: bool,
        vocab_size: int,
        name: str = "",
        holdout_tokens: int = 0,
        part: Literal["training", "validation"] = "training",
    ) -> None:
        if sequence_length < 1:
            raise DataError(f"sequence_length is {sequence_length}, expected at least 1: change data.sequence_length")
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self.vocab_size = vocab_size
        self.name = name
        listed = paths if isinstance(paths, ShardList) else list_shards(paths)
        self.shards = listed.shards
        self._whole = TokenStream(listed.shards)
        total = self._whole.num_tokens
        self.held_out = held_out_ranges(total, sequence_length, holdout_tokens) if holdout_tokens else None
        """Of all tokens; None: nothing is held out."""
        self._stream: TokenStream | JoinedStretches = self._whole
        if self.held_out is not None:
            training = part == "training"
            stretches = self.held_out.training() if training else self.held_out.windows(sequence_length)
            self._stream = JoinedStretches(self._whole, stretches)
        self.num_tokens = self._stream.num_tokens
        """Of this part."""
        if self.num_tokens < sequence_length:
            raise DataError(
                f"{_shown(listed)}: {total} tokens in all"
                + (f", {self.num_tokens} in the {part} part" if holdout_tokens else "")
                + f", expected at least one window of {sequence_length}: add text or reduce data.sequence_length"
                + (f" (data.holdout_tokens is {holdout_tokens})" if holdout_tokens else "")
            )
        # so many windows fit behind every phase; a corpus of one or two windows restricts the phase instead
        room = self.num_tokens - (sequence_length - 1 if shuffle else 0)
        self.num_windows = max(1, room // sequence_length)
        """Samples in an epoch, the same for all epochs."""
        self._purpose = f"order/{name}" if name else "order"
        # an epoch may begin at so many places
        slack = self.num_tokens - self.num_windows * sequence_length
        self._phases = min(sequence_length, slack + 1)

    def epoch_of(self, sample_index: int) -> int:
        """The epoch, from 0, that sample `sample_index` belongs to."""
        return self._split(sample_index)[0]

    def __getitem__(self, sample_index: int) -> NDArray[np.int64]:
        """Tokens of sample `sample_index` >= 0, of any size: int64 [sequence_length], the caller's own copy."""
        window = np.empty((1, self.sequence_length), dtype=np.int64)
        self.read([sample_index], window)
        return window[0]

    def read(self, sample_indices: Sequence[int], out: NDArray[Any]) -> None:
        """Write the tokens of the samples into the rows of `out` [b, sequence_length], int64 or int32, C-contiguous."""
        starts = np.fromiter(map(self._start, sample_indices), dtype=np.int64, count=len(sample_indices))
        self._stream.read(starts, out, self.vocab_size)

    def tokens_at(self, offsets: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """The `count` tokens from each of `offsets` of this part on: int64 [len(offsets), count]."""
        tokens = np.empty((len(offsets), count), dtype=np.int64)
        # any id: whether one is too large is for who trains on it, and then the message names the sample's place
        self._stream.read(offsets, tokens, np.iinfo(np.int32).max)
        return tokens

    def document_starts(self, sample_index: int) -> NDArray[np.int64]:
        """Positions in (0, sequence_length) of a sample at which documents begin, ascending."""
        start = self._start(sample_index)
        return self._stream.document_starts(start, start + self.sequence_length) - start

    def begins_document(self, sample_index: int) -> bool:
        """Whether a sample's first token is a document's."""
        start = self._stream.in_shards(self._start(sample_index))
        return start == 0 or self._whole.document_starts(start - 1, start + 1).size > 0

    def origin(self, sample_index: int) -> Origin:
        """Where a sample comes from."""
        start = self._start(sample_index)
        epoch, position = self._split(sample_index)
        pieces = self._stream.pieces(start, start + self.sequence_length)
        return Origin(self.name, int(sample_index), epoch, position, self.num_windows, pieces)

    def _start(self, sample_index: int) -> int:
        """Offset of a sample's first token in this part."""
        epoch, position = self._split(sample_index)
        if not self.shuffle:
            return position * self.sequence_length
        key, random_bits = _epoch_draws(self.seed, self._purpose, epoch)
        phase = random_bits * self._phases >> 64
        return phase + permute(position, self.num_windows, key) * self.sequence_length

    def _split(self, sample_index: int) -> tuple[int, int]:
        index = operator.index(sample_index)
        if index < 0:
            # also keeps `list(corpus)`-like habits from meaning something: there is no last sample
            raise IndexError(f"sample index is {index}, expected 0 or more")
        return divmod(index, self.num_windows)


@lru_cache(maxsize=1024)
def _epoch_draws(seed: int, purpose: str, epoch: int) -> tuple[int, int]:
    """Key of an epoch's permutation, and 64 random bits for its phase: Philox keyed by (seed, "phase") at counter =
    epoch."""
    # random_raw: numpy promises this stream to stay what it is, and does not promise that of integers()
    philox = np.random.Philox(key=derive_key(seed, "phase"), counter=epoch)
    return derive_key(seed, purpose, epoch), int(philox.random_raw())


def _shown(listed: ShardList) -> str:
    prefixes = [shard.prefix for shard in listed.shards]
    return ", ".join(prefixes[:3]) + (f" and {len(prefixes) - 3} more" if len(prefixes) > 3 else "")

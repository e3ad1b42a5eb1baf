"""The corpus as training sees it: an endless list of samples, any of which can be computed from its index alone."""

import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from illada_megatron.data.errors import DataError
from illada_megatron.data.indexed_dataset import IndexedDataset, check_token_ids
from illada_megatron.data.order import derive_key, permute

_GLOB_CHARACTERS = frozenset("*?[")


def resolve_prefixes(paths: Sequence[str | Path]) -> list[str]:
    """Prefixes of shards, in order. An entry is a prefix or a glob of prefixes; what a glob matches is sorted by
    name (so number shards with leading zeros).

    Raises DataError when there is no entry, a glob matches nothing, or a shard is listed twice."""
    if not paths:
        raise DataError(
            "no shards were given, expected at least one prefix or glob of prefixes: set data.train_paths "
            "(data.validation_paths for validation)"
        )
    prefixes = [prefix for path in paths for prefix in _expand(str(path))]
    prefix, occurrences = Counter(prefixes).most_common(1)[0]
    if occurrences > 1:
        raise DataError(
            f"{prefix}: this shard is listed {occurrences} times in {[str(path) for path in paths]}, expected once: "
            "two entries of data.train_paths (or validation_paths) overlap"
        )
    return prefixes


def _expand(pattern: str) -> list[str]:
    # a name that has brackets or stars in it and is there as such is meant as such
    if not _GLOB_CHARACTERS & set(pattern) or Path(pattern + ".idx").exists():
        return [pattern]
    anchor = Path(pattern).anchor
    relative = pattern[len(anchor) :]
    # a lone .bin is matched too: IndexedDataset then says that its index is missing instead of it being left out
    matches = sorted(
        {str(path)[: -len(suffix)] for suffix in (".bin", ".idx") for path in Path(anchor).glob(relative + suffix)}
    )
    if not matches:
        raise DataError(
            f"{pattern}: no shard matches this glob, expected files {pattern}.idx (current directory: {Path.cwd()})"
        )
    return matches


class Corpus:
    """Windows of `sequence_length` tokens from the concatenated shards, epoch after epoch.

    The shards' tokens form one stream (windows run across documents and shards). Each epoch cuts it into
    `num_windows` windows, the first beginning at the epoch's phase, a draw from [0, sequence_length): the tokens
    left over at the two ends, less than two windows, differ from epoch to epoch. The windows come in an order that
    is another permutation each epoch.

    Sample i is a pure function of (tokens, sequence_length, seed, i); how the tokens are split into shards plays no
    part. There is no state and no array as long as the epoch: a sample costs O(log shards) and its own tokens.

    paths: prefixes or globs of prefixes, see `resolve_prefixes`.
    shuffle: False reads the windows in stream order from phase 0 in every epoch (validation).
    vocab_size: an id outside [0, vocab_size) is an error that names its shard and offset.

    Raises DataError for unusable shards or fewer tokens than one window."""

    def __init__(
        self, paths: Sequence[str | Path], sequence_length: int, seed: int, shuffle: bool, vocab_size: int
    ) -> None:
        if sequence_length < 1:
            raise DataError(f"sequence_length is {sequence_length}, expected at least 1: change data.sequence_length")
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self.vocab_size = vocab_size
        self.shards = [IndexedDataset(prefix) for prefix in resolve_prefixes(paths)]
        # [shards + 1]: stream offset at which each shard begins, then the total
        self._starts = np.cumsum([0] + [shard.num_tokens for shard in self.shards], dtype=np.int64)
        self.num_tokens = int(self._starts[-1])
        if self.num_tokens < sequence_length:
            raise DataError(
                f"{', '.join(shard.prefix for shard in self.shards)}: {self.num_tokens} tokens in all, expected at "
                f"least one window of {sequence_length}: add text or reduce data.sequence_length"
            )
        # so many windows fit behind every phase; a corpus of one or two windows restricts the phase instead
        room = self.num_tokens - (sequence_length - 1 if shuffle else 0)
        self.num_windows = max(1, room // sequence_length)
        """Samples in an epoch, the same for all epochs."""

    def epoch_of(self, sample_index: int) -> int:
        """The epoch, from 0, that sample `sample_index` belongs to."""
        return self._split(sample_index)[0]

    def __getitem__(self, sample_index: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of sample `sample_index` >= 0, of any size: int64 [sequence_length], the caller's own copy."""
        epoch, position = self._split(sample_index)
        if not self.shuffle:
            return self._read(position * self.sequence_length)
        window = permute(position, self.num_windows, derive_key(self.seed, "order", epoch))
        return self._read(self._phase(epoch) + window * self.sequence_length)

    def _split(self, sample_index: int) -> tuple[int, int]:
        index = operator.index(sample_index)
        if index < 0:
            # also keeps `list(corpus)`-like habits from meaning something: there is no last sample
            raise IndexError(f"sample index is {index}, expected 0 or more")
        return divmod(index, self.num_windows)

    def _phase(self, epoch: int) -> int:
        """Stream offset of the epoch's first window, from Philox keyed by (seed, "phase") at counter = epoch."""
        slack = self.num_tokens - self.num_windows * self.sequence_length
        choices = min(self.sequence_length, slack + 1)
        # random_raw: numpy promises this stream to stay what it is, and does not promise that of integers()
        philox = np.random.Philox(key=derive_key(self.seed, "phase"), counter=epoch)
        return int(philox.random_raw()) * choices >> 64

    def _read(self, start: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens [start, start + sequence_length) of the stream."""
        window = np.empty(self.sequence_length, dtype=np.int64)
        filled = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < self.sequence_length:
            dataset = self.shards[shard]
            offset = start + filled - int(self._starts[shard])
            tokens = dataset.read(offset, min(self.sequence_length - filled, dataset.num_tokens - offset))
            check_token_ids(tokens, self.vocab_size, dataset.prefix, offset)
            window[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            shard += 1
        return window

"""What the tokens of a corpus say before any model has seen them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from illada_megatron.data.indexed_dataset import IndexedDataset, check_token_ids
from illada_megatron.data.shards import resolve_prefixes

_COUNTED_AT_A_TIME = 1 << 22


def unigram_entropy(paths: Sequence[str | Path], vocab_size: int) -> float:
    """Entropy of the tokens' empirical distribution, -sum_v f_v ln f_v, in nats per token.

    A model that has learnt only how frequent each token is has this loss per token; one that has learnt anything
    about context is below it. paths: as `Corpus`. Raises DataError as `Corpus` does."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for prefix in resolve_prefixes(paths):
        shard = IndexedDataset(prefix)
        for start in range(0, shard.num_tokens, _COUNTED_AT_A_TIME):
            tokens = shard.read(start, min(_COUNTED_AT_A_TIME, shard.num_tokens - start))
            check_token_ids(tokens, vocab_size, prefix, start)
            counts += np.bincount(tokens, minlength=vocab_size)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())

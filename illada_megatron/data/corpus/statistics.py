"""What the tokens of a corpus say before any model has seen them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from illada_megatron.data.corpus.stream import TokenStream
from illada_megatron.data.shards.shard_list import list_shards

_COUNTED_AT_A_TIME = 1 << 20


def unigram_entropy(paths: Sequence[str | Path], vocab_size: int) -> float:
    """Entropy of the tokens' empirical distribution, -sum_v f_v ln f_v, in nats per token.

    A model that has learnt only how frequent each token is has this loss per token; one that has learnt anything
    about context is below it. paths: as `Corpus`. Raises DataError as `Corpus` does."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    stream = TokenStream(list_shards(paths).shards)
    for start in range(0, stream.num_tokens, _COUNTED_AT_A_TIME):
        tokens = np.empty((1, min(_COUNTED_AT_A_TIME, stream.num_tokens - start)), dtype=np.int64)
        stream.read(np.array([start]), tokens, vocab_size)
        counts += np.bincount(tokens[0], minlength=vocab_size)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())

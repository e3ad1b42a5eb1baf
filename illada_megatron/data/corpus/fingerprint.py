"""What a run reads, in a few bytes that change when it does: a checkpoint keeps them.

The tokens are looked at in few places, wherever the shards are and however they are cut; the order is described by all
that it is a function of.
"""

from typing import Any

import numpy as np
import xxhash

from illada_megatron.data.corpus.blended_corpus import BlendedCorpus
from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.tokenizers.tokenizer import Tokenizer

_PLACES = 16
_TOKENS = 32


def fingerprints(corpus: BlendedCorpus, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Of the tokenizer (SHA-256 of its file; None: the run has none), of each corpus's tokens, and of the order in
    which samples come."""
    held_out = {one.name: one.held_out.text() for one in corpus.corpora if one.held_out is not None}
    return {
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "data": {
            **({"held_out": held_out} if held_out else {}),  # older versions held out other tokens, and have none here
            "corpora": {one.name: of_tokens(one) for one in corpus.corpora},
            "order": {
                "sequence_length": corpus.sequence_length,
                "seed": corpus.corpora[0].seed,
                "shuffle": corpus.corpora[0].shuffle,
                # only where it is not 1: checkpoints from before there was a choice lack it
                **({} if corpus.samples_per_window == 1 else {"samples_per_window": corpus.samples_per_window}),
                "shares_from_sample": {
                    str(start): [str(share) for share in proportions.shares]
                    for start, proportions in zip(corpus.schedule.starts, corpus.schedule.proportions, strict=True)
                },
            },
        },
    }


def differences(saved: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """What differs, a line each: the place in the fingerprints, the saved value and the one now."""
    lines = []
    for key in sorted({*saved, *now}):
        before, after, name = saved.get(key), now.get(key), f"{where}.{key}" if where else key
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, name)
        elif before != after:
            lines.append(f"{name} was {before}, is {after}")
    return lines


def of_tokens(corpus: Corpus) -> str:
    """How many, and a hash of those in some places."""
    count = min(_TOKENS, corpus.num_tokens)
    starts = np.linspace(0, corpus.num_tokens - count, _PLACES).astype(np.int64)
    return f"{corpus.num_tokens} tokens, {xxhash.xxh3_64_hexdigest(corpus.tokens_at(starts, count).tobytes())}"

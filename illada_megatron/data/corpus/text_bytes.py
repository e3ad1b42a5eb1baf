"""How many bytes of text stand behind tokens: bounds per byte compare across tokenizers, bounds per token do not."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.tokenizers.spelling import bytes_of_tokens
from illada_megatron.data.tokenizers.tokenizer import Tokenizer

# what tokenizers lose, and decoders change that do not only join tokens: spaces before marks, contractions, runs of
# spaces, lines
_PROBES = (
    "a , b . c",
    "it is n't so , he said .",
    "Do n't you 've ? Yes ! ( 1 , 2 ) [ x ]",
    "def f(self, x):\n    return  {'a': x[0] + 1}\n\n\n\tpass\r\n",
    "na\u00efve \u00dcbung \u4e2d\u6587\u3001\u65e5\u672c\u8a9e \U0001f642\U0001f469\u200d\U0001f4bb",
    "  two before, two after  ",
)
_NORMALIZED = "e\u0301 \u2581 \ufffd"
"""What is spelled otherwise by some, and is then counted as they spell it."""


@dataclass(frozen=True)
class TokenBytes:
    """Of a tokenizer."""

    of_token: NDArray[np.float64]
    """UTF-8 bytes of each id `[vocab_size]`: 0 of special tokens, NaN of one that stands for text it does not know."""
    prefix_bytes: int
    """Of these, how many of a document's first token are not the document's: the space that some tokenizers put
    before it."""


def token_bytes(tokenizer: Tokenizer | None) -> TokenBytes | str:
    """The bytes of each token of a tokenizer that gives texts back, as its tokens' texts joined; else, why they are not
    known."""
    if tokenizer is None:
        return "data.tokenizer_path is not set"
    sizes = np.array([len(one) for one in bytes_of_tokens(tokenizer)], np.float64)
    sizes[_unknown(tokenizer)] = np.nan
    if np.isnan(sizes[tokenizer.encode(_PROBES[0])].sum()):
        return f"the tokenizer does not know {_PROBES[0]!r}"
    prefix = round(float(sizes[tokenizer.encode("a")].sum())) - 1
    for probe in (*_PROBES, _NORMALIZED):
        ids = tokenizer.encode(probe)
        total, text = sizes[ids].sum(), tokenizer.decode(ids)
        if np.isnan(total):
            continue
        if total != len(text.encode()) + prefix or (text != probe and probe != _NORMALIZED):
            return f"the tokenizer gives {probe!r} back as {text!r}"
    return TokenBytes(sizes, prefix)


def window_bytes(sizes: TokenBytes, corpus: Corpus, window: int) -> float:
    """Bytes of text behind the tokens of a window; NaN where some stand for text that the tokenizer does not know."""
    tokens = corpus[window]
    if tokens.max() >= len(sizes.of_token):
        return float("nan")
    each = sizes.of_token[tokens]
    if sizes.prefix_bytes:
        firsts = corpus.document_starts(window)
        firsts = np.concatenate([[0], firsts]) if corpus.begins_document(window) else firsts
        each[firsts] -= np.where(each[firsts] > 0, sizes.prefix_bytes, 0)
    return float(each.sum())


def _unknown(tokenizer: Tokenizer) -> list[int]:
    """The ids, if there are any, that stand for all that the vocabulary lacks."""
    text = "a\U0010fffd"
    ids = tokenizer.encode(text)
    return [] if tokenizer.decode(ids) == text else sorted(set(ids) - set(tokenizer.encode("a")))

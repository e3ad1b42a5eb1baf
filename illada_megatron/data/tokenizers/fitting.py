"""Whether a tokenizer goes with a model: its mask, which no text may hold, and the sizes of both vocabularies."""

import re
from pathlib import Path

from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.tokenizer import UNKNOWN_CHARACTER, Tokenizer

_BYTE = re.compile(r"<0x([0-7][0-9A-F])>")
# below it rows are left that cost memory and are never trained; padding that published models have is above
_USUAL_SHARE = 0.9


def text_of(tokenizer: Tokenizer, token_id: int) -> str | None:
    """A text that has `token_id` among its ids; None: none was found, as of special tokens."""
    if not 0 <= token_id < tokenizer.vocab_size:
        return None
    piece = tokenizer.piece(token_id)
    byte = _BYTE.fullmatch(piece)
    texts = (piece, piece.strip(), f"a{piece}", UNKNOWN_CHARACTER, *([chr(int(byte[1], 16))] if byte else ()))
    return next((text for text in texts if token_id in tokenizer.encode(text)), None)


def check_mask(tokenizer: Tokenizer, name: str | Path, mask_token_id: int | None = None) -> None:
    """Raises DataError where text can hold the mask: it could not be told from noise, and its label would teach to
    predict masks. mask_token_id: the model's, for a message about `model.mask_token_id`; None: the tokenizer's own."""
    mask = tokenizer.mask_id if mask_token_id is None else mask_token_id
    text = None if mask is None else text_of(tokenizer, mask)
    if text is None:
        return
    if tokenizer.mask_id == mask:
        raise DataError(
            f"{name}: its mask, id {mask}, is what it gives to the text {text!r}: expected a special token, which no "
            "text can hold (SentencePiece: a control symbol)"
        )
    right = (
        without_mask(tokenizer, name) if tokenizer.mask_id is None else f"the tokenizer's mask is {tokenizer.mask_id}"
    )
    raise DataError(
        f"model.mask_token_id is {mask}, the id that {name} gives to the text {text!r}: a mask must not be a word; "
        f"{right}"
    )


def without_mask(tokenizer: Tokenizer, name: str | Path) -> str:
    """What to do with a tokenizer that has no mask."""
    ids = tokenizer.vocab_size
    return (
        f"{name} has no mask token among its {ids:,} ids: before a corpus is made with it, give it one (the ids of "
        f"text stay as they are, its fingerprint does not): illada tokenizer add-mask {name} --output NEW; or "
        f"mask with an id behind its own: model.mask_token_id={ids} with a model.vocab_size of {ids + 1:,} or more"
    )


def unused_rows(tokenizer: Tokenizer, name: str | Path, vocab_size: int) -> str | None:
    """A warning about a model of many more ids than its tokenizer has; None where they are about as many."""
    if tokenizer.vocab_size >= _USUAL_SHARE * vocab_size:
        return None
    return (
        f"{name} has {tokenizer.vocab_size:,} ids, model.vocab_size is {vocab_size:,}: the other rows of the embedding "
        "are never trained; lower model.vocab_size, or name another tokenizer"
    )

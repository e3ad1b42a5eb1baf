"""The bytes of text behind each token of a vocabulary."""

import re
from collections.abc import Callable, Container

from illada_megatron.data.tokenizers.tokenizer import SPACE_SIGN, Tokenizer

_NOT_TEXT = "\ufffd"
"""What decoders write for a part of a character."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """For each id, b"" of special tokens. A token's text is what it adds between two others when the tokenizer decodes
    them. Where it is part of a character, its bytes are those that the vocabulary spells: `<0x0A>` is one, and a sign
    of byte-level BPE is one."""
    between = tokenizer.encode("a")[-1:]
    before = tokenizer.decode(between)
    behind = len(tokenizer.decode(between * 2)) - len(before)
    words = []
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([*between, token_id, *between])
        spelled = tokenizer.spelled(token_id)
        if _NOT_TEXT not in text:
            words.append(text[len(before) : len(text) - behind].encode())
        elif byte := _BYTE.fullmatch(spelled):
            words.append(bytes([int(byte[1], 16)]))
        elif _BYTE_SIGNS.keys() >= set(spelled):
            words.append(bytes(_BYTE_SIGNS[sign] for sign in spelled))
        else:  # the sign itself, as a token of its own
            words.append(spelled.replace(SPACE_SIGN, " ").encode())
    return words


def decode_behind(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """`decode` of tokens that follow others: with the space that some decoders leave out where a text begins."""
    before = tokenizer.encode("a")[-1:]
    first = len(tokenizer.decode(before))
    return lambda ids: tokenizer.decode([*before, *ids])[first:]


def unknown_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids, if there are any, that stand for all that the vocabulary lacks."""
    text = "a\U0010fffd"
    ids = tokenizer.encode(text)
    return [] if tokenizer.decode(ids) == text else sorted(set(ids) - set(tokenizer.encode("a")))


def is_byte_level(names: Container[str]) -> bool:
    """Whether all 256 bytes are among the names of a vocabulary, as byte-level BPE spells them."""
    return all(sign in names for sign in _BYTE_SIGNS)


def _byte_signs() -> dict[str, int]:
    """The characters by which byte-level BPE spells the 256 bytes (GPT-2, encoder.py: bytes_to_unicode)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    hidden = sorted(set(range(256)) - set(shown))
    return {chr(one): one for one in shown} | {chr(256 + number): one for number, one in enumerate(hidden)}


_BYTE_SIGNS = _byte_signs()

"""Tokenizers behind one small interface: a SentencePiece `.model` or a Hugging Face `tokenizer.json`.

Text is only ever text: a document that contains the characters of a special token ("</s>", "<|mdm_mask|>") is
encoded as those characters, so the mask and the end of a document cannot be forged by the corpus. Only what a chat
template has rendered is encoded otherwise: load_tokenizer(path, special_tokens=True)."""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.finding import find_tokenizer

MASK_NAMES = ("<mask>", "[MASK]", "<|mdm_mask|>", "<|mask|>")
BOS_NAMES = ("<s>", "<|startoftext|>", "[BOS]", "<bos>", "<|begin_of_text|>")
EOS_NAMES = ("</s>", "<|endoftext|>", "[EOS]", "<eos>", "<|end_of_text|>")

MOST_IDS = 1 << 24
"""Far above any vocabulary: what has a place for each id has room for them."""
UNKNOWN_CHARACTER = "\U0010fffd"

# SentencePiece writes a space as this character and reads it back as a space
SPACE_SIGN = "\u2581"


class Tokenizer(Protocol):
    """Text to ids in [0, vocab_size) and back. No id is added that the text does not hold (no BOS, no EOS)."""

    vocab_size: int
    """One more than the largest id."""
    mask_id: int | None
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    """SHA-256 of the tokenizer's file, hexadecimal: two shards with the same one were made by the same tokenizer."""

    def special_names(self) -> list[str]:
        """The special tokens as they are spelled."""

    def special_ids(self) -> dict[str, int]:
        """Their ids by these names."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode() of each text, on the library's own threads."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text; special tokens by their names ("<mask>") if skip_special_tokens is False.
        Raises IndexError for an id outside [0, vocab_size)."""

    def piece(self, token_id: int) -> str:
        """One token for a reader: its text, the name of a special token, "<0x0A>" for a lone byte."""

    def spelled(self, token_id: int) -> str:
        """One token as the vocabulary spells it, with its own sign for a space; "": there is none of this id."""


def load_tokenizer(name: str | Path, special_tokens: bool = False, option: str = "data.tokenizer_path") -> Tokenizer:
    """The tokenizer that `find_tokenizer` finds: a file, a directory or a name on the Hugging Face hub.

    special_tokens: encode the name of a special token as that token, for text that a chat template has rendered.
    option: that gave the name, for messages.

    Raises DataError when there is none or the library cannot read the file."""
    path = find_tokenizer(name, option)
    return parsed_tokenizer(path, path.read_bytes(), special_tokens)


def forget_tokenizers() -> None:
    """Where this process needs the tokenizers that it has loaded no more: one takes some 50 MB."""
    parsed_tokenizer.cache_clear()


@functools.lru_cache(maxsize=2)
def parsed_tokenizer(path: Path, content: bytes, special_tokens: bool = False) -> Tokenizer:
    """The tokenizer of a file with this content. Whoever reads the same file again gets the same one: parsing takes a
    tenth of a second. Raises DataError."""
    kind = SentencePieceTokenizer if path.suffix == ".model" else HuggingFaceTokenizer
    return kind(path, content, special_tokens)


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` (numpy and torch integers too) as a list of Python's."""
    checked = [int(token_id) for token_id in ids]
    for position, token_id in enumerate(checked):
        if not 0 <= token_id < vocab_size:
            raise IndexError(f"token id is {token_id} at position {position}, expected 0 to {vocab_size - 1}")
    return checked


def _replaced(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    """`ids` with `new` wherever `old` is in it."""
    out: list[int] = []
    start = 0
    for place in range(len(ids)):
        if place >= start and ids[place : place + len(old)] == old:
            out += ids[start:place] + new
            start = place + len(old)
    return out + ids[start:]


class SentencePieceTokenizer:
    """A SentencePiece model (https://github.com/google/sentencepiece)."""

    def __init__(self, path: Path, content: bytes, special_tokens: bool) -> None:
        """content: the file's."""
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            # not by its name: the library calls an unreadable file a wrong one
            self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{path}: expected a SentencePiece model, the library says: {error}") from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.bos_id = self._declared(self._processor.bos_id(), BOS_NAMES)
        self.eos_id = self._declared(self._processor.eos_id(), EOS_NAMES)
        self.mask_id = self._find(MASK_NAMES)
        sign_bytes = [self._find((f"<0x{byte:02X}>",)) for byte in SPACE_SIGN.encode()]
        # the ids that stand for a literal space sign, where the model has byte pieces
        self._space_sign_ids: list[int] = [byte for byte in sign_bytes if byte is not None]
        self._special: dict[str, int] = {}
        if special_tokens:
            self._special = self.special_ids()

    def _declared(self, token_id: int, names: Sequence[str]) -> int | None:
        """The id that the model file itself declares (-1: none), else the piece with one of the usual names."""
        return token_id if token_id >= 0 else self._find(names)

    def _find(self, names: Sequence[str]) -> int | None:
        for name in names:
            token_id: int = self._processor.piece_to_id(name)
            # an unknown name is answered with the id of <unk>
            if self._processor.id_to_piece(token_id) == name:
                return token_id
        return None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def special_names(self) -> list[str]:
        return list(self.special_ids())

    def special_ids(self) -> dict[str, int]:
        controls = filter(self._processor.is_control, range(self.vocab_size))
        return {self._processor.id_to_piece(token_id): token_id for token_id in controls}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._encode_with_special(texts) if self._special else self._encode_plain(texts)

    def _encode_with_special(self, texts: list[str]) -> list[list[int]]:
        """The library never reads a control symbol from text: split at their names, the longest first."""
        names = sorted(self._special, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
        parts = [pattern.split(text) for text in texts]  # text, name, text, name, ..., text
        encoded = iter(self._encode_plain([part for text_parts in parts for part in text_parts[::2]]))
        batch = []
        for text_parts in parts:
            ids = list(next(encoded))
            for name in text_parts[1::2]:
                ids += [self._special[name], *next(encoded)]
            batch.append(ids)
        return batch

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        if len(self._space_sign_ids) != 3:
            return self._processor.encode(texts)
        # a literal space sign would come back as a space; spelled in bytes it comes back as itself. Encoded piece by
        # piece, each would get the model's dummy prefix: another character takes the sign's place instead
        stands_for = [self._stand_in(text) if SPACE_SIGN in text else None for text in texts]
        batch: list[list[int]] = self._processor.encode(
            [text.replace(SPACE_SIGN, one[0]) if one else text for text, one in zip(texts, stands_for, strict=True)]
        )
        return [
            _replaced(ids, one[1], self._space_sign_ids) if one else ids
            for ids, one in zip(batch, stands_for, strict=True)
        ]

    def _stand_in(self, text: str) -> tuple[str, list[int]]:
        """A character that is not in `text` and that the model spells in bytes, and their ids."""
        for character in map(chr, range(0xE000, 0xF900)):  # private use: a piece of no model that we know
            if character not in text:
                start, ids = self._processor.encode(["a", f"a{character}"])
                if ids[: len(start)] == start and ids[len(start) :] == [
                    self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()
                ]:
                    return character, ids[len(start) :]
        raise DataError(
            "a text holds the space sign \u2581 and all characters of private use, none of which is left to stand for "
            "it: take the sign out of the text"
        )

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        ids = _checked(ids, self.vocab_size)
        if skip_special_tokens:
            return self._processor.decode(ids)
        text, start = "", 0
        for position, token_id in enumerate(ids):
            if self._processor.is_control(token_id):
                text += self._processor.decode(ids[start:position]) + self._processor.id_to_piece(token_id)
                start = position + 1
        return text + self._processor.decode(ids[start:])

    def piece(self, token_id: int) -> str:
        (token_id,) = _checked([token_id], self.vocab_size)
        return self.spelled(token_id).replace(SPACE_SIGN, " ")

    def spelled(self, token_id: int) -> str:
        piece: str = self._processor.id_to_piece(token_id)
        return piece


class HuggingFaceTokenizer:
    """A tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, path: Path, content: bytes, special_tokens: bool) -> None:
        """content: the file's."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            # what the file lacks for a character that it does not know, it would lack in the middle of a corpus
            self._tokenizer.decode(self._tokenizer.encode(UNKNOWN_CHARACTER, add_special_tokens=False).ids)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and its panics are none
            raise DataError(f"{path}: expected a Hugging Face tokenizer.json, the library says: {error}") from error
        # a tokenizer.json may have been saved with a length limit: it would cut documents without a word
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not special_tokens
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 1 <= self.vocab_size <= MOST_IDS:
            raise DataError(f"{path}: its largest id is {self.vocab_size - 1}, expected one from 0 to {MOST_IDS - 1}")
        self.fingerprint = hashlib.sha256(content).hexdigest()
        added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.bos_id = self._find(BOS_NAMES)
        self.eos_id = self._find(EOS_NAMES)
        self.mask_id = self._find(MASK_NAMES)

    def _find(self, names: Sequence[str]) -> int | None:
        ids = self.special_ids()
        return next((ids[name] for name in names if name in ids), None)

    def special_names(self) -> list[str]:
        return list(self._special.values())

    def special_ids(self) -> dict[str, int]:
        return {name: token_id for token_id, name in self._special.items()}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int) -> str:
        (token_id,) = _checked([token_id], self.vocab_size)
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        # part of a character has no text of its own: show the vocabulary's name for it; a hole in the vocabulary, ""
        return self._tokenizer.id_to_token(token_id) or "" if "\ufffd" in text or not text else text

    def spelled(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

"""Long texts in pieces whose ids, one after another, are the text's: libraries take 10 to 50 bytes for each character.

A text is cut between two words. There no id changes if

- no token holds a letter with a space behind it, so that none reaches across: what is merged on one side, or chosen
  there as the likeliest, does not depend on the other; and
- the rules by which text is prepared and split into words take both sides for what they were. These look at the
  neighbourhood, so the reference is asked about it, at each place: both halves have to have the ids of the whole.

Some tokenizers put a space in front of a text that has none, others in front of any: for these the space is left out
where the text is cut.

What the reference gives for the pieces is what counts, for every engine. It is what it gives for the whole but for one
thing: SentencePiece adds up a unigram model's scores from a text's beginning on, in single precision. Of two readings
that are equally likely (12 spaces and 15, or 15 and 12) rounding chooses, and chooses otherwise in a longer text."""

import functools
import re
from collections.abc import Iterator

from illada_megatron.data.tokenizers.tokenizer import Tokenizer

LONG_CHARACTERS = 1 << 21
PIECE_CHARACTERS = 1 << 16
_NEIGHBOURHOOD = 300
_LETTER = r"[^\W\d_]"
_BETWEEN_WORDS = re.compile(f"(?<={_LETTER}) (?={_LETTER})")
_REACHES_ACROSS = re.compile(f"{_LETTER} ")


class LongTexts:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @staticmethod
    def is_long(text: str) -> bool:
        return len(text) > LONG_CHARACTERS

    def pieces(self, text: str) -> Iterator[str]:
        """Of about PIECE_CHARACTERS each; longer where there is no place to cut."""
        start = place = 0
        while len(text) - start > 2 * PIECE_CHARACTERS and self._can_be_cut:
            found = _BETWEEN_WORDS.search(text, max(place, start + PIECE_CHARACTERS))
            if found is None:
                break
            place = found.end()
            next_start = self._start_behind(text, found.start())
            if next_start is not None:
                yield text[start : found.start()]
                start = next_start
        yield text[start:]

    def _start_behind(self, text: str, space: int) -> int | None:
        """Where the piece behind the space at `space` starts; None: not to be cut here."""
        encode = self._tokenizer.encode
        before, after = text[space - _NEIGHBOURHOOD : space], text[space : space + _NEIGHBOURHOOD]
        whole, left = encode(before + after), encode(before)
        for start in (space, space + 1):
            if left + encode(after[start - space :]) == whole:
                return start
        return None

    @functools.cached_property
    def _can_be_cut(self) -> bool:
        pieces = map(self._tokenizer.piece, range(self._tokenizer.vocab_size))
        return not any(map(_REACHES_ACROSS.search, pieces))

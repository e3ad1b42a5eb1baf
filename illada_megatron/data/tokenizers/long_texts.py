"""Long texts in pieces whose ids, one after another, are the text's: libraries take 10 to 50 bytes for each character.

A text is cut between two words. There no id changes if

- no token holds a space behind a letter, so that none reaches across: what is merged on one side, or chosen there
  as the likeliest, does not depend on the other; and
- the rules by which text is prepared and split into words take both sides for what they were. These look at the
  neighbourhood, so the reference is asked about it, at each place: both sides have to have the ids of the whole. It is
  asked twice, with sides of prime lengths, which no rule that counts characters divides.

Some tokenizers put a space in front of a text that has none, others in front of any: for these the space is left out
where the text is cut.

What the reference gives for the pieces is what counts, for every engine. It is what it gives for the whole but for one
thing: SentencePiece adds up a unigram model's scores from a text's beginning on, in single precision, and the more have
been added, the larger a difference is lost in rounding. Of the two the pieces' ids are the more exact."""

import functools
import re
import string
from collections.abc import Iterator

from illada_megatron.data.tokenizers.tokenizer import SPACE_SIGN, Tokenizer

LONG_CHARACTERS = 1 << 20
PIECE_CHARACTERS = 1 << 16
_SIDES = (257, 331)
# a rule about the ends of a text forbids every place
_MOST_REFUSED = 10
_NEXT_PLACE = 1_000
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_NO_LETTER = re.escape(string.whitespace + string.punctuation + string.digits)
# a letter and a space, as vocabularies spell a space: as itself, by SentencePiece's and Metaspace's sign, or as a byte,
# before which a letter may be any byte (but those of \t \n \v \f \r)
_REACHES_ACROSS = re.compile(f"[^{_NO_LETTER}{SPACE_SIGN}][ {SPACE_SIGN}]|[^{_NO_LETTER}\u0120\u0109-\u010d]\u0120")


class LongTexts:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @staticmethod
    def is_long(text: str) -> bool:
        return len(text) > LONG_CHARACTERS

    def pieces(self, text: str) -> Iterator[str]:
        """Of about PIECE_CHARACTERS each; longer where there is no place to cut."""
        start, place, refused = 0, PIECE_CHARACTERS, 0
        while len(text) - start > 2 * PIECE_CHARACTERS and refused < _MOST_REFUSED and self._can_be_cut:
            found = _BETWEEN_WORDS.search(text, place)
            if found is None:
                break
            next_start = self._start_behind(text, found.start())
            if next_start is None:
                place, refused = found.end() + _NEXT_PLACE, refused + 1
                continue
            yield text[start : found.start()]
            start, place, refused = next_start, next_start + PIECE_CHARACTERS, 0
        yield text[start:]

    def _start_behind(self, text: str, space: int) -> int | None:
        """Where the piece behind the space at `space` starts; None: not to be cut here."""
        for start in (space, space + 1):
            if all(self._same_ids(text, space, start, side) for side in _SIDES):
                return start
        return None

    def _same_ids(self, text: str, space: int, start: int, side: int) -> bool:
        before, after = text[max(0, space - side) : space], text[space : space + side]
        whole, *parts = self._tokenizer.encode_batch([before + after, before, after[start - space :]])
        return whole == [token for part in parts for token in part]

    @functools.cached_property
    def _can_be_cut(self) -> bool:
        tokens = range(self._tokenizer.vocab_size)
        names = (name for token in tokens for name in (self._tokenizer.spelled(token), self._tokenizer.piece(token)))
        return not any(map(_REACHES_ACROSS.search, names))

"""The part of a text in work that no later step changes, so that it can be sent.

Settled are the tokens left of the first mask. Their text is not yet: a character may need bytes of the next token, and
a stop string may have begun. So what is sent is always the beginning of what the finished text will be.
"""

import re
from collections.abc import Collection, Sequence

from illada_megatron.data.tokenizers.tokenizer import Tokenizer
from illada_megatron.generation.ending import Decode

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN = "\ufffd"


class Settled:
    """Of one text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        decode: Decode,
        stop: Sequence[str] = (),
        ends: Collection[int] = (),
        hold: bool = False,
    ) -> None:
        """decode: in which stop strings are looked for. ends: ids before the first of which the text ends. hold:
        nothing is settled before the end, as with a pattern that may begin anywhere."""
        self._tokenizer, self._decode, self._stop, self._ends, self._hold = tokenizer, decode, tuple(stop), ends, hold
        self._tokens: list[int] = []
        self._ended = False
        self._sent = ""
        self._joins: dict[int, bool] = {}

    def more(self, tokens: Sequence[int]) -> str:
        """What can be sent, now that these have settled."""
        for token in tokens:
            self._ended = self._ended or token in self._ends
            if not self._ended:
                self._tokens.append(token)
        if self._hold or not tokens:
            return ""
        text = self._text()
        # what was sent holds no stop string whole, and the begin of none
        behind = len(self._sent)
        text = text[: min((_begin_of(one, text, behind) for one in self._stop), default=len(text))]
        if not text.startswith(self._sent):
            return ""
        new = text[len(self._sent) :]
        self._sent = text
        return new

    def rest(self, text: str) -> str:
        """What is left of the finished text. Raises ValueError where it does not begin with what was sent: a tokenizer
        whose text of some tokens depends on those that follow."""
        if not text.startswith(self._sent):
            raise ValueError("this tokenizer changes text that it has decoded already: ask without stream")
        return text[len(self._sent) :]

    def _text(self) -> str:
        """Without what may become another character: bytes of a run that may go on, half a character."""
        count = len(self._tokens)
        while count and self._may_join(self._tokens[count - 1]):
            count -= 1
        return self._decode(self._tokens[:count]).rstrip(_UNKNOWN)

    def _may_join(self, token: int) -> bool:
        """A byte on its own; a token without a text, beyond which bytes join."""
        if token not in self._joins:
            spelled = _BYTE.fullmatch(self._tokenizer.spelled(token)) is not None
            self._joins[token] = spelled or self._tokenizer.decode([token]) == ""
        return self._joins[token]


def _begin_of(stop: str, text: str, behind: int) -> int:
    """Where from `behind` on `stop` begins in `text`, or may begin at its end."""
    found = text.find(stop, behind)
    if found >= 0:
        return found
    longest = min(len(stop) - 1, len(text) - behind)
    return len(text) - next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

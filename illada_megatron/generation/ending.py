"""When a text ends: an end-of-text or stop token, a stop string, a pattern; looked for when a block is done."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from illada_megatron.generation.proposing import Words
from illada_megatron.generation.text import Text

Decode = Callable[[list[int]], str]
Finish = Literal["eos", "stop", "length"]
Search = Callable[[str], int | None]
"""Where in a text something begins; None: nowhere."""


@dataclass(frozen=True)
class End:
    """Where a text ends and why."""

    finish: Finish
    tokens: int
    """Of the text that are left, the prompt's among them; a stop string's own are."""
    characters: int | None = None
    """Of the generated text; None: all."""
    by_token: bool = False
    """The last token is what ended it, and no text."""


def search_of(pattern: str) -> Search:
    """Of Python's `re`."""

    def search(words: str) -> int | None:
        match = re.search(pattern, words)
        return match.start() if match else None

    return search


def end_of(text: Text, words: Words, decode: Decode | None, search: Search | None) -> End | None:
    """The end within what is done of a continued text: one of the tokens that end it, or before that a stop string or
    what `search` finds."""
    settings = text.settings
    done = text.span[1]
    generated = text.tokens[text.given : done].tolist()
    found_end: End | None = None
    ends = words.ends(settings)
    if (count := next((n for n, token in enumerate(generated) if token in ends), None)) is not None:
        by_eos = generated[count] == words.eos
        found_end = End("eos" if by_eos else "stop", text.given + count + 1, by_token=True)
        generated = generated[:count]
    if decode is None or not (settings.stop or search):
        return found_end
    written = decode(generated)
    found = [at for one in settings.stop if (at := written.find(one)) >= 0]
    if search is not None and (begin := search(written)) is not None:
        found.append(begin)
    if not found:
        return found_end
    return End("stop", text.given + len(generated), min(found))

"""When a text ends: an end-of-text token, a stop string, a pattern; looked for when a block is done."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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


def search_of(pattern: str) -> Search:
    """Of Python's `re`."""

    def search(words: str) -> int | None:
        match = re.search(pattern, words)
        return match.start() if match else None

    return search


def end_of(text: Text, eos_token_id: int | None, decode: Decode | None, search: Search | None) -> End | None:
    """The end within what is done of a continued text: an end-of-text token, or before it a stop string or what
    `search` finds."""
    settings = text.settings
    done = text.span[1]
    generated = text.tokens[text.given : done].tolist()
    ends: End | None = None
    if settings.eos != "never" and eos_token_id in generated:
        count = generated.index(eos_token_id) + 1
        ends = End("eos", text.given + count)
        generated = generated[: count - 1]
    if decode is None or not (settings.stop or search):
        return ends
    words = decode(generated)
    found = [at for one in settings.stop if (at := words.find(one)) >= 0]
    if search is not None and (begin := search(words)) is not None:
        found.append(begin)
    if not found:
        return ends
    return End("stop", text.given + len(generated), min(found))

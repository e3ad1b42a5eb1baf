"""Stop patterns of strangers: with RE2, whose time is linear in the text. Python's `re` can be made to run for ever.

RE2 has no backreferences and no lookaround, and its \\d, \\s and \\w are ASCII's (https://github.com/google/re2/wiki/Syntax).
"""

import re2

from illada_megatron.generation.ending import Search

_MEMORY_BYTES = 1 << 20
MOST_CHARACTERS = 1_000


def pattern_search(pattern: str) -> Search:
    """Raises ValueError where RE2 cannot read it, it is too large or it matches an empty text."""
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"stop_pattern has {len(pattern):,} characters, at most {MOST_CHARACTERS:,} are allowed")
    options = re2.Options()
    options.max_mem = _MEMORY_BYTES
    options.log_errors = False
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
        raise ValueError(f"stop_pattern is no regular expression of RE2, or too large a one: {reason}") from error
    if compiled.search("") is not None:
        raise ValueError("stop_pattern matches an empty text, which every text holds")

    def search(words: str) -> int | None:
        match = compiled.search(words)
        return match.start() if match else None

    return search

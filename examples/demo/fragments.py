"""Real code for the demo to generate from: taken from held-out files by a fixed rule, never by how the result looks."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from illada_megatron.data.tokenizer import Tokenizer

# The longest prompt, in lines: what a window of the demo's training holds with room for what is generated
LINES_BEFORE = 8
LINES_AFTER = 6
_METHOD = re.compile(r"    def \w+\(self.*\):")
_LOOP = re.compile(r"\s+for (?P<variable>\w+) in .+:")


@dataclass(frozen=True)
class Fragment:
    """A prompt for `illada generate`."""

    path: str
    """The held-out file."""
    prompt: str
    """`<mask:N>` marks a gap of N tokens."""
    truth: tuple[str, ...]
    """What stands in the gaps, in order."""


def choose(corpus: Path, tokenizer: Tokenizer) -> tuple[Fragment, Fragment]:
    """(continuation, infilling) from the documents of a JSONL file, in its order.

    Continuation: the first method that has enough lines before it, up to and including its head. Infilling: the first
    loop whose variable is used in the line that follows, which is the gap.
    Raises RuntimeError where no document has one.
    """
    return _first(corpus, "method", _continuation), _first(
        corpus, "loop", lambda path, lines: _infilling(path, lines, tokenizer)
    )


def _first(corpus: Path, kind: str, pick: Callable[[str, list[str]], Iterator[Fragment]]) -> Fragment:
    with corpus.open(encoding="utf-8") as file:
        for document in map(json.loads, file):
            for fragment in pick(document["path"], document["text"].split("\n")):
                return fragment
    raise RuntimeError(f"{corpus}: no document has a {kind} to generate from; collect another corpus")


def _continuation(path: str, lines: list[str]) -> Iterator[Fragment]:
    for number in range(LINES_BEFORE, len(lines)):
        if _METHOD.fullmatch(lines[number]):
            yield Fragment(path, "\n".join([*lines[number - LINES_BEFORE : number + 1], ""]), ())


def _infilling(path: str, lines: list[str], tokenizer: Tokenizer) -> Iterator[Fragment]:
    for number in range(LINES_BEFORE, len(lines) - LINES_AFTER):
        loop, body = _LOOP.fullmatch(lines[number]), lines[number + 1].lstrip()
        if loop and re.search(rf"\b{loop['variable']}\b", body):
            indent = lines[number + 1][: -len(body)]
            before = "\n".join([*lines[number + 1 - LINES_BEFORE : number + 1], indent])
            after = "\n".join(["", *lines[number + 2 : number + 1 + LINES_AFTER]])
            yield Fragment(path, f"{before}<mask:{len(tokenizer.encode(body))}>{after}", (body,))

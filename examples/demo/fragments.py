"""Real code for the demo to generate from: taken from held-out files by a fixed rule, never by how the result looks."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from illada_megatron.data.tokenizers.tokenizer import Tokenizer

# Prompts stay within the sequences that the demo trains on.
CONTEXT_LINES = 8
INFILLED_LINES = 14
INFILLED_TOKENS = 110
# Of the infilling's tokens so many are kept, then so many hidden, over and over.
KEPT_TOKENS, HIDDEN_TOKENS = 8, 3
_METHOD = re.compile(r"    def \w+\(self.*\):")


@dataclass(frozen=True)
class Fragment:
    """A prompt for `illada generate`, and what the file has in its place."""

    path: str
    """The held-out file."""
    prompt: str
    """`<mask:N>` marks a gap of N tokens."""
    truth: tuple[tuple[str, bool], ...] = ()
    """The file's text in parts: (text, whether it is a gap in the prompt)."""

    def styled_truth(self) -> Text:
        """The file's text with what the gaps hide in bold."""
        return Text.assemble(*((text, "bold" if hidden else "dim") for text, hidden in self.truth))


def choose(corpus: Path, tokenizer: Tokenizer) -> tuple[Fragment, Fragment]:
    """(continuation, infilling) around the first method, with enough lines before and after it, of a JSONL corpus.

    Continuation: the lines before it, and its head. Infilling: its first lines, with gaps at even distances.
    Raises RuntimeError where no document has one.
    """
    with corpus.open(encoding="utf-8") as file:
        for document in map(json.loads, file):
            lines = document["text"].split("\n")
            for number in range(CONTEXT_LINES, len(lines) - INFILLED_LINES):
                if _METHOD.fullmatch(lines[number]):
                    before = "\n".join([*lines[number - CONTEXT_LINES : number + 1], ""])
                    body = "\n".join(lines[number : number + INFILLED_LINES])
                    return Fragment(document["path"], before), with_gaps(document["path"], body, tokenizer)
    raise RuntimeError(f"{corpus}: no document has a method to generate from; collect another corpus")


def with_gaps(path: str, text: str, tokenizer: Tokenizer) -> Fragment:
    """Hide HIDDEN_TOKENS tokens after every KEPT_TOKENS tokens of `text`."""
    ids = tokenizer.encode(text)[:INFILLED_TOKENS]
    prompt, truth = "", []
    for start in range(0, len(ids), KEPT_TOKENS + HIDDEN_TOKENS):
        kept, hidden = ids[start : start + KEPT_TOKENS], ids[start + KEPT_TOKENS : start + KEPT_TOKENS + HIDDEN_TOKENS]
        truth.append((tokenizer.decode(kept), False))
        prompt += truth[-1][0]
        if hidden:
            truth.append((tokenizer.decode(hidden), True))
            prompt += f"<mask:{len(hidden)}>"
    return Fragment(path, prompt, tuple(truth))

"""Command blocks of the pages, and what an HTML comment before a block says of it.

A block is indented by four spaces, or fenced without a language or with `sh`. It holds commands where its first line
is of one of `PROGRAMS`, or with `$ `: then the other lines are what the commands print. A comment stands right
before the block:

    <!-- slow -->              takes long: run with the slow tests, as what depends on it has to be
    <!-- not run: why -->      cannot be run here, and why: a GPU, Slurm, a network, no end
    <!-- file: my.yaml -->     no commands: the content of that file, which the commands after it read
    <!-- after: PAGE -->       at a page's begin: its commands go on from where those of PAGE end
"""

import re
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {"illada", "python", "make", "tensorboard", "source", "pip", "sbatch", "mkdir", "bash"}
_COMMENT = re.compile(r"<!-- (slow|not run: .+|file: \S+|after: \S+) -->")
_FENCE = re.compile(r"```(\w*)$")


@dataclass(frozen=True)
class Block:
    """Of a page."""

    line: int
    """Of its first line, from 1."""
    text: str
    mark: str
    """What the comment says; empty: there is none."""

    @property
    def file(self) -> str | None:
        """What it is the content of."""
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None

    @property
    def commands(self) -> str:
        """For a shell; empty: it holds none."""
        lines = self.text.splitlines()
        if any(line.startswith("$ ") for line in lines[:1]):
            return "\n".join(line.removeprefix("$ ") for line in lines if line.startswith("$ "))
        return self.text if self.file is None and self.text.split()[0] in PROGRAMS else ""


@dataclass(frozen=True)
class Page:
    """A page's blocks, in order."""

    after: str | None
    blocks: list[Block]


def read_page(path: Path) -> Page:
    """Raises ValueError where a comment is before nothing, so that it says nothing."""
    after, blocks, mark = None, list[Block](), ""
    lines = path.read_text().splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        if found := _COMMENT.fullmatch(line.strip()):
            if found[1].startswith("after: "):
                after = found[1].removeprefix("after: ")
            elif mark:
                raise ValueError(f"{path}:{number + 1}: a comment before another")
            else:
                mark = found[1]
            number += 1
        elif fence := _FENCE.fullmatch(line):
            end = next(at for at in range(number + 1, len(lines)) if lines[at].rstrip() == "```")
            if fence[1] in ("", "sh", "yaml"):
                blocks.append(Block(number + 2, "\n".join(lines[number + 1 : end]), mark))
            mark, number = "", end + 1
        elif line.startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(one.removeprefix("    ") for one in lines[number:end]).strip("\n")
            blocks.append(Block(number + 1, text, mark))
            mark, number = "", end
        else:
            if mark and line.strip():
                raise ValueError(
                    f"{path}:{number + 1}: text after the comment {mark!r}, expected the block that it is of"
                )
            number += 1
    return Page(after, blocks)

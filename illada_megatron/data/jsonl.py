"""JSON Lines, one document a line: what is wrong with a line is said with its file and number."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from illada_megatron.data.errors import DataError

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Line:
    """A line as read. Exactly one of `text` and `problem` is None, both are for a blank line."""

    line_bytes: int
    """Size of the line in its file, for progress."""
    text: str | None = None
    text_bytes: int = 0
    """Size of `text` as UTF-8."""
    problem: str | None = None
    """file:line, what was found and what was expected."""


def check_files(paths: Sequence[str | Path]) -> list[Path]:
    """Raise DataError unless there is at least one path and all are files, before any work is done."""
    if not paths:
        raise DataError("no input was given, expected at least one JSON Lines file")
    for path in map(Path, paths):
        if not path.is_file():
            raise DataError(f"{path}: no such file, expected JSON Lines (one {{...}} object a line)")
    return [Path(path) for path in paths]


def read_lines(paths: Iterable[Path], text_key: str) -> Iterator[Line]:
    """All lines of all files, one at a time."""
    for path in paths:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                yield _parse(raw, text_key, f"{path}:{number}")


def read_texts(paths: Sequence[str | Path], text_key: str) -> Iterator[str]:
    """The documents; the first bad line raises DataError."""
    for line in read_lines(check_files(paths), text_key):
        if line.problem is not None:
            raise DataError(line.problem)
        if line.text:
            yield line.text


def _parse(raw: bytes, text_key: str, place: str) -> Line:
    size = len(raw)
    if not raw.strip():
        return Line(size)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, a number of 5000 digits
        return Line(size, problem=f"{place}: not valid JSON ({error}); the line begins {_shown(raw)}")
    if not isinstance(value, dict):
        return Line(size, problem=f"{place}: found {_named(value)}, expected an object with the key {text_key!r}")
    if text_key not in value:
        keys = ", ".join(map(repr, list(value)[:10])) or "no keys"
        return Line(size, problem=f"{place}: the key {text_key!r} is missing, found {keys}")
    text = value[text_key]
    if not isinstance(text, str):
        return Line(size, problem=f"{place}: the key {text_key!r} holds {_named(text)}, expected a string")
    try:
        return Line(size, text=text, text_bytes=len(text.encode()))
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; UTF-8 and tokenizers cannot
        return Line(size, problem=f"{place}: the text is not valid Unicode ({error.reason} at {error.start})")


def _shown(raw: bytes) -> str:
    return repr(raw[:_SHOWN_CHARACTERS].decode("utf-8", errors="replace"))


def _named(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")

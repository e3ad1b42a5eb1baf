"""Where lines stand that could not be used. A task that begins in the middle of a file does not know the numbers of its
lines: they are counted when they are told, in one pass over the part of the file that lies before the last of them."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from illada_megatron.data.preprocessing.chunks import count_newlines

MOST_BAD_PLACES = 10
"""The first ones are kept, of a corpus of any size."""


class BadPlace(BaseModel):
    """Of one line (`number`, from 1, of those that begin behind `behind_byte` of the file), one row of Parquet (from
    0), or a whole text."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    behind_byte: int = 0
    number: int | None = None
    row: int | None = None


def told(places: Sequence[BadPlace]) -> list[str]:
    """As file:line, in the order given. Raises OSError."""
    before: dict[tuple[str, int], int] = {}
    counted: dict[str, tuple[int, int]] = {}
    for path, start in sorted({(place.path, place.behind_byte) for place in places if place.behind_byte}):
        # the lines of a range are those behind the first line end at or after the byte before it
        end, lines = counted.get(path, (0, 0))
        lines += count_newlines(Path(path), start - 1, end)
        counted[path] = start - 1, lines
        before[path, start] = lines + 1
    return [_told(place, before.get((place.path, place.behind_byte), 0)) for place in places]


def _told(place: BadPlace, before: int) -> str:
    if place.row is not None:
        return f"{place.path}: row {place.row}"
    return place.path if place.number is None else f"{place.path}:{before + place.number}"

"""Fields of configurations as dotted names, and which of them differ."""

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "-"
"""What a configuration has of a field that its program did not know."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.field` -> value, of nested sections; a list is one value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differing(configurations: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The fields in which not all are the same, with the value of each, in the order of the schema."""
    flattened = [flat(one) for one in configurations]
    names = dict.fromkeys(name for one in flattened for name in one)
    rows = {name: [one.get(name, MISSING) for one in flattened] for name in names}
    return {name: row for name, row in rows.items() if any(_other(value, row[0]) for value in row)}


def _other(one: Any, another: Any) -> bool:
    """Of plain values; a tuple of the schema is a list in YAML and JSON."""
    if isinstance(one, list | tuple) and isinstance(another, list | tuple):
        return list(one) != list(another)
    return one != another or isinstance(one, bool) != isinstance(another, bool)

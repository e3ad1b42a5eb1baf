"""An expression -> the edges of its automaton over a vocabulary, by outlines-core.

A stranger's is made in a process of its own, whose seconds and bytes have an end: `(a|b)*a(a|b){30}` needs more than
any machine has. So this file is a program too, which imports nothing else of the package.
"""

import importlib
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MISSING = "regex and json_schema need outlines-core: pip install 'illada-megatron[constrained]'"
_SIGN = b"\x00"
_MOST_EDGES = 8_000_000
_MOST_STATES = 4_096
"""Whether one follows another is a table of their square, read for each mask of a step."""
_SECONDS, _BYTES = 20, 4 << 30
"""That a stranger's may take."""
_Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Edges:
    """Of states from 0, where a text begins, to `states` - 1."""

    sources: _Numbers
    """Ascending."""
    tokens: _Numbers
    targets: _Numbers
    final: _Numbers
    """States in which a text may end."""
    states: int


def edges_of(expression: str, words: Mapping[bytes, Sequence[int]], schema: bool = False) -> Edges:
    """Of a regular expression, or a JSON schema, over the tokens `words`: bytes -> ids that are spelled so. Raises
    ValueError where it is none, too large a one, or outlines-core is not installed."""
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as error:
        raise ValueError(_MISSING) from error
    whole = expression_of(expression) if schema else expression
    shown = f"regex {whole[:200]!r}"
    # Index leaves out tokens behind which a text cannot end, where it could before them: of (ab)* an "a" behind "ab".
    # With a sign behind everything it can end nowhere else; where the sign may stand, the text may end
    sign = max(token_id for ids in words.values() for token_id in ids) + 1
    known = {word: list(ids) for word, ids in words.items() if _SIGN not in word}
    whole = whole.removeprefix("^")  # it describes the whole text
    if whole.endswith("$") and not whole.endswith("\\$"):
        whole = whole[:-1]
    try:
        index = Index(f"(?:{whole}){_SIGN.decode()}", Vocabulary(sign + 1, {**known, _SIGN: [sign]}))
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error
    table: dict[int, dict[int, int]] = index.get_transitions()
    edges = sum(map(len, table.values()))
    if edges > _MOST_EDGES or len(table) > _MOST_STATES:
        raise ValueError(
            f"{shown}: {len(table)} states with {edges} tokens from one to another, expected at most {_MOST_STATES} "
            f"with {_MOST_EDGES}: count fewer characters ({{0,80}} and maxLength take a state for each)"
        )
    return _numbered(table, index.get_initial_state(), index.get_final_states(), sign)


def _numbered(table: dict[int, dict[int, int]], first: int, ended: set[int], sign: int) -> Edges:
    names = np.array(sorted(table, key=lambda name: (name != first, name)))
    end, by_name = len(names), np.argsort(names)
    final = [state for state, name in enumerate(names.tolist()) if table[name].get(sign) in ended]
    parts = []
    for state, name in enumerate(names.tolist()):
        of_state = np.array([*table[name].items()], np.int64).reshape(-1, 2)
        place = np.searchsorted(names, of_state[:, 1], sorter=by_name).clip(max=end - 1)
        here = (of_state[:, 0] < sign) & (names[by_name[place]] == of_state[:, 1])  # behind the sign is nothing
        parts.append((np.full(int(here.sum()), state), of_state[here, 0], by_name[place[here]]))
    sources, tokens, targets = (np.concatenate(of_all) for of_all in zip(*parts, strict=True))
    return Edges(sources, tokens, targets, np.array(final, np.int64), end)


def edges_apart(expression: str, words: Mapping[bytes, Sequence[int]], schema: bool = False) -> Edges:
    """`edges_of`, in a process of its own. Raises ValueError where it needs more than it may, too."""
    given = pickle.dumps((expression, words, schema, _SECONDS, _BYTES))
    command = [sys.executable, "-P", __file__]  # -P: beside this file are others' names
    own = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=4 * _SECONDS, env=own, check=False)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        what = "json_schema" if schema else "regex"
        raise ValueError(
            f"{what} {expression[:200]!r}: its automaton takes more than {_SECONDS} seconds or {_BYTES >> 30} GiB to "
            "make: ask for a simpler one"
        )
    found = pickle.loads(done.stdout)
    if isinstance(found, str):
        raise ValueError(found)
    return Edges(*found)


def expression_of(schema: str) -> str:
    """A regular expression of the JSON texts that fit a JSON schema. Raises ValueError where it cannot be made."""
    try:
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError as error:
        raise ValueError(_MISSING) from error
    try:
        _check_schema(json.loads(schema), (), {})
        return str(build_regex_from_schema(schema))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # of a schema that is none
        raise ValueError(f"json_schema is none that a regular expression can follow: {error}") from error


_FOLLOWED = {
    *("type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "enum", "const"),
    *("anyOf", "minLength", "maxLength", "pattern", "$ref"),
}
_SAYS_NOTHING = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions"}
"""About what fits."""


def _check_schema(schema: Any, above: tuple[str, ...], root: Any) -> None:
    """outlines-core passes over what it does not know: a text would not fit. Raises ValueError."""
    if not isinstance(schema, dict):
        raise ValueError(f"expected an object, found {json.dumps(schema)[:60]}")
    root = root or schema
    if unknown := sorted(schema.keys() - _FOLLOWED - _SAYS_NOTHING):
        raise ValueError(f"it has {', '.join(unknown)}, expected nothing but {', '.join(sorted(_FOLLOWED))}")
    if (name := schema.get("$ref")) is not None:
        if name in above:
            raise ValueError(f"{name} refers to itself")
        target = root
        for part in str(name).removeprefix("#/").split("/"):
            target = target.get(part, {}) if isinstance(target, dict) else {}
        _check_schema(target, (*above, name), root)
    extra = schema.get("additionalProperties", False)
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", [])]
    inner += [one for one in (extra, schema.get("items", True)) if not isinstance(one, bool)]
    for one in inner:
        _check_schema(one, above, root)


def _main() -> None:
    expression, words, schema, seconds, most = pickle.load(sys.stdin.buffer)
    with suppress(ImportError):  # said by edges_of; where memory ends in the midst of it, it would seem to be missing
        importlib.import_module("outlines_core.json_schema")
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        found: Any = astuple(edges_of(expression, words, schema))
    except ValueError as error:
        found = str(error)
    pickle.dump(found, sys.stdout.buffer)


if __name__ == "__main__":
    _main()

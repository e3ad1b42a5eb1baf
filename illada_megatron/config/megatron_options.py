"""The words of a pretrain_gpt.py command line as options and values, as far as `megatron_names.py` knows them."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from illada_megatron.config.load import ConfigError
from illada_megatron.config.megatron_names import HARMLESS, OPTIONS, Option, find_option, spelled

_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "text": str}


@dataclass
class Given:
    """What a command line says."""

    values: dict[str, Any] = field(default_factory=dict)
    """By option, of those that have a field here; the last one wins."""
    without: list[tuple[Option, str]] = field(default_factory=list)
    """Options without one, and their values as they were typed."""
    unknown: list[str] = field(default_factory=list)
    """What neither version of Megatron has, with a guess."""
    ranks: int | None = None
    """torchrun's nproc_per_node * nnodes, and..."""
    nproc: int | None = None
    nnodes: str = "1"

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)


def read_options(words: Sequence[str]) -> Given:
    """words: of a command, as `torchrun --nproc_per_node 8 pretrain_gpt.py --num-layers 32 ...`, or its options.

    Raises ConfigError: a value of another type, a shell variable that nobody has set, or another program."""
    given = Given()
    start = _read_launch(given, words)
    open_variables: list[str] = []
    for typed, texts in _grouped(words[start:]):
        option = find_option(typed)
        if option is None:
            names = [one.name for one in OPTIONS if "*" not in one.name]
            close = difflib.get_close_matches(spelled(typed), names, n=1, cutoff=0.8)
            given.unknown.append(typed + (f" (did you mean {close[0]}?)" if close else ""))
        elif option.field is None:
            if not texts or texts[0] not in HARMLESS.get(spelled(typed), ()):
                given.without.append((Option(spelled(typed), note=option.note, group=option.group), " ".join(texts)))
        elif any("$" in text or "`" in text for text in texts):
            open_variables.append(f"{option.name} {' '.join(texts)}")
        else:
            given.values[option.name] = _parsed(option, texts)
    if open_variables:
        raise ConfigError(
            f"these are known to the shell alone: {'; '.join(open_variables)}. Give the script's arguments behind its "
            "name, and its variables as NAME=VALUE: illada translate FILE ARGUMENT ... NAME=VALUE ..."
        )
    return given


def _read_launch(given: Given, words: Sequence[str]) -> int:
    """Where the options of the program begin."""
    for place, word in enumerate(words):
        if not word.endswith(".py") or word.startswith("-"):
            continue
        program = PurePath(word).name
        if program != "pretrain_gpt.py" and program.startswith("pretrain_"):
            raise ConfigError(
                f"{program} trains another model than pretrain_gpt.py, whose options alone are translated"
            )
        launch = dict(_grouped(words[:place]))
        said = {spelled(name): texts[0] for name, texts in launch.items() if texts}
        nproc, nnodes = said.get("--nproc-per-node"), said.get("--nnodes", "1")
        given.nproc = int(nproc) if nproc is not None and nproc.isdecimal() else None
        given.nnodes = nnodes
        if given.nproc is not None and nnodes.isdecimal():
            given.ranks = given.nproc * int(nnodes)
        return place + 1
    return 0


def _grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option with the words behind it."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
    return groups


def _parsed(option: Option, texts: list[str]) -> Any:
    if option.kind == "flag":
        if texts:
            raise ConfigError(f"{option.name} takes no value, found {' '.join(texts)}")
        return True
    if option.kind == "list":
        if not texts:
            raise ConfigError(f"{option.name} has no value")
        return [part for text in texts for part in text.split()]
    if not texts:
        raise ConfigError(f"{option.name} has no value")
    text = " ".join(texts)  # of a text that the shell has split
    try:
        return _TYPES[option.kind](text)
    except ValueError as error:
        expected = "a whole number" if option.kind == "int" else "a number"
        raise ConfigError(f"{option.name} is {text}, expected {expected}") from error

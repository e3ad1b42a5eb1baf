"""A few hundred mutations of each format, the same ones every time; `make fuzz-formats` tries others."""

import random
from pathlib import Path

import pytest
from formats import FORMATS, Misbehaviour, try_input

MUTATIONS = 300
FOUND = Path(__file__).parent / "found"


def _mutated(chance: random.Random, seeds: list[bytes], words: tuple[bytes, ...]) -> bytes:
    """One to four changes of a seed: a bit, a byte, a cut, a piece doubled, removed or of another seed, a word."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.randint(1, 16))
        kind = chance.randrange(7 if words else 6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = chance.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            del data[at:end]
        elif kind == 5:
            other = chance.choice(seeds)
            begin = chance.randrange(len(other))
            data[at:end] = other[begin : begin + 16]
        elif words:
            data[at : chance.choice((at, end))] = chance.choice(words)
    return bytes(data)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_taken_or_refused(name: str, tmp_path: Path) -> None:
    """Never another error, and nothing happens but reading."""
    seeds, chance = list(FORMATS[name].seeds().values()), random.Random(name)
    results = [_tried(name, seed, tmp_path, f"seed{number}") for number, seed in enumerate(seeds)]
    assert any(results)
    for number in range(MUTATIONS):
        results.append(_tried(name, _mutated(chance, seeds, FORMATS[name].words), tmp_path, str(number)))
    assert not all(results)


@pytest.mark.parametrize("file", sorted(FOUND.iterdir()), ids=lambda path: path.name)
def test_what_was_found_once(file: Path, tmp_path: Path) -> None:
    """Named FORMAT-WHAT_IT_WAS."""
    _tried(file.name.partition("-")[0], file.read_bytes(), tmp_path, "once")


def _tried(name: str, content: bytes, tmp_path: Path, number: str) -> bool:
    folder = tmp_path / number
    folder.mkdir()
    try:
        return try_input(name, content, folder)
    except BaseException as error:
        error.add_note(f"the {name} file lies in {folder}")
        raise


def test_the_watch_sees() -> None:
    """What the formats are watched for is noticed."""
    import os

    from formats import _watched

    for act in (
        lambda: Path("/tmp/illada-fuzz-never").write_text(""),
        lambda: os.system("true"),
        lambda: exec(compile("1", "from a file", "exec")),
        lambda: Path("/etc/hostname").read_text(),
    ):
        with pytest.raises(Misbehaviour), _watched(False, Path("/nowhere")):
            act()

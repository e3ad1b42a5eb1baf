"""`illada generate`: many texts, their settings, and the ways to see them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launch import Illada

from illada_megatron.cli.generate_command import _texts

SHORT = ("--gen-length", 8, "--block-length", 4, "--steps", 2)


@pytest.fixture
def options(place: Path) -> tuple[Any, ...]:
    return ("generate", "--checkpoint", place / "run", "--tokenizer", place / "tokenizer.json", "--device", "cpu")


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_many_texts_with_settings_of_their_own(options: tuple[Any, ...], tmp_path: Path, illada: Illada) -> None:
    texts = ["w7 ", {"prompt": "w8 <mask:3>w9 "}, {"prompt": "w9 ", "gen_length": 4, "cache": "dual", "seed": 5}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)) + "\n\n")
    done = illada(*options, *SHORT, "--prompts", tmp_path / "texts.jsonl", "--json")
    assert done.code == 0, done.err
    found = lines(done.out)
    assert [len(one["tokens"]) for one in found] == [9, 5, 5]
    assert found[1]["order"][0] == found[1]["order"][4] == -1
    for text, one in zip(("w7 ", "w8 <mask:3>w9 "), found, strict=False):
        assert lines(illada(*options, *SHORT, "--prompt", text, "--json").out) == [one]
    assert lines(illada(*options, *SHORT, "--prompt", "w7 ", "--prompt", "w8 <mask:3>w9 ", "--json").out) == found[:2]


def test_a_page_holds_every_text_and_nothing_of_another_place(
    options: tuple[Any, ...], tmp_path: Path, illada: Illada
) -> None:
    page = tmp_path / "page.html"
    done = illada(*options, *SHORT, "--prompt", "w7 ", "--prompt", "w8 ", "--json", "--html", page)
    assert done.code == 0, done.err
    content = page.read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)
    shown = json.loads(data)
    assert [one["order"] for one in shown] == [one["order"] for one in lines(done.out)]
    assert [one["steps"] for one in shown] == [4, 4]
    assert not re.search(r"https?://|src=|@import|url\(", content)


def test_played(options: tuple[Any, ...], illada: Illada) -> None:
    done = illada(*options, *SHORT, "--prompt", "w7 ", "--show")
    assert done.code == 0, done.err
    assert "4/4" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "w7", "--json", "--plain"], "three ways to see a text: give one"),
        (["--prompt", "w7", "--prompt", "w8", "--show"], "--show and --svg are of one text, found 2"),
        (["--prompt", "w7", "--reveal", "all"], "reveal must be one of 'steps', 'threshold'"),
        (["--prompt", "w7", "--top-p", "0.5"], "set a temperature above 0"),
        (["--prompt", "w7", "--pipeline", "2"], "2 pipeline stages do not divide 1 ranks"),
        (["--prompts", "BAD"], "line 2: not valid JSON"),
        (["--prompts", "UNKNOWN"], "'lenght'"),
        (["--prompts", "NONE"], "line 1: expected a text or"),
    ],
)
def test_refused(arguments: list[str], message: str, options: tuple[Any, ...], tmp_path: Path, illada: Illada) -> None:
    contents = {"BAD": '"a"\n{', "UNKNOWN": '{"prompt": "w7", "lenght": 3}', "NONE": '{"text": "w7"}'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    outcome = illada(*options, *[str(tmp_path / one) if one in contents else one for one in arguments])
    assert outcome.code == 2
    assert message in outcome.err


def test_a_line_ends_at_a_newline_alone(tmp_path: Path) -> None:
    """JSON lets a text hold the other signs that Python calls line ends."""
    texts = ["a\u2028b", "c\x85d"]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in texts))
    assert [text for text, _ in _texts(None, None, tmp_path / "texts.jsonl")] == texts

"""Text of others in a terminal: an escape sequence could rename its window, write into its clipboard or hide a line."""

import ast
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launch import Illada
from rich.table import Table

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.cli import generate_command, main
from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter
from illada_megatron.system.console import made_console
from illada_megatron.system.terminal import printable, say, show_defect

ROOT = Path(__file__).parents[2]
ATTACK = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31m\rd\x08e\u202ef"
SHOWN = r"a\x1b]0;owned\x07b\x1b[2Jc\x9b31m\rd\x08e\u202ef"
# rich itself leaves out what rings, goes back or returns
SHOWN_BY_RICH = SHOWN.replace(r"\x07", "").replace(r"\x08", "").replace(r"\r", "")
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def test_what_is_printable() -> None:
    assert printable(ATTACK) == SHOWN
    for same in ("plain\ttext\n", "naïve ✓ 日本語 é", "▁<0x0A>"):
        assert printable(same) == same
    assert printable("\ud800") == "\\ud800"  # half a character, which print() could not write
    every = "".join(map(chr, range(0x3000)))
    assert not FORBIDDEN.search(printable(every))


def test_say_and_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    say(ATTACK)
    say(ATTACK, error=True)
    table = Table("name")
    table.add_row(f"{ATTACK} [red]no markup[/nor] :smile:")
    made_console(width=200).print(table)
    made_console(width=200).print(f"{ATTACK} [link=file:///etc]x[/link]")
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 1
    assert out.count(SHOWN_BY_RICH) == 2
    assert err.count(SHOWN) == 1
    assert "[red]no markup[/nor] :smile:" in out
    assert "[link=file:///etc]x[/link]" in out
    assert not FORBIDDEN.search(out + err)


def test_colours_stay() -> None:
    """What rich writes itself is its own."""
    file = io.StringIO()
    made_console(file=file, force_terminal=True, color_system="standard").print(ATTACK, style="red")
    assert file.getvalue().startswith("\x1b[31m")
    assert not FORBIDDEN.search(file.getvalue().replace("\x1b[31m", "").replace("\x1b[0m", ""))


def test_errors_and_defects(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The message of an error that the user can mend, and the traceback of one that nobody can."""

    def fail() -> None:
        raise CheckpointError(ATTACK)

    monkeypatch.setattr(main, "_made_app", lambda _: fail)
    with pytest.raises(SystemExit):
        main.main()
    assert sys.excepthook is show_defect
    error = ValueError(ATTACK)
    show_defect(type(error), error, None)
    err = capsys.readouterr().err
    assert err.count(SHOWN) == 2
    assert not FORBIDDEN.search(err)


class _Bytes:
    """A tokenizer whose ids are characters."""

    vocab_size, mask_id, bos_id, eos_id, fingerprint = 256, 5, None, None, ""

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join(map(chr, ids))

    def special_names(self) -> list[str]:
        return []


def test_samples_of_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, illada: Illada) -> None:
    text = "x\x1b]52;c;b3duZWQ=\x07y\x9b2J\r" * 40
    with IndexedDatasetWriter(tmp_path / "shard", 256) as writer:
        writer.add(np.array(list(text.encode("latin-1"))), np.array([len(text)]))
    (tmp_path / "t.json").write_text("{}")
    monkeypatch.setattr("illada_megatron.cli.sample_command.load_tokenizer", lambda _: _Bytes())
    outcome = illada(
        *("sample", "0", f"data.train_paths=[{tmp_path / 'shard'}]", f"data.tokenizer_path={tmp_path / 't.json'}"),
        *("data.sequence_length=32", "model.max_sequence_length=64", "model.vocab_size=256", "--config", "tiny"),
    )
    assert outcome.code == 0, outcome.err
    assert r"\x1b]52;c;b3duZWQ=\x07" in outcome.out
    assert not FORBIDDEN.search(outcome.out)


def test_generated_text(capsys: pytest.CaptureFixture[str]) -> None:
    """`generate --plain`: a model has read what a corpus holds."""

    class Result:
        tokens = np.array(list(ATTACK.replace("\u202e", "").encode("latin-1")))

    generator = SimpleNamespace(tokenizer=_Bytes())
    generate_command._show(Result(), generator, plain=True, as_json=False, svg=None)  # type: ignore[arg-type]
    assert capsys.readouterr().out == SHOWN.replace(r"\u202e", "") + "\n"


def test_nothing_else_writes_to_the_terminal() -> None:
    """Whoever adds a print() may be printing others' text: `say` and `made_console` are for it."""
    found = []
    for file in [*(ROOT / "illada_megatron").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        if file.parent == ROOT / "illada_megatron" / "system" and file.stem in ("terminal", "console"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            told = called in ("sys.exit", "SystemExit", "exit") and any(
                isinstance(one, ast.JoinedStr | ast.Constant) and not isinstance(getattr(one, "value", ""), int)
                for one in node.args  # type: ignore[attr-defined]
            )
            if told or called in ("print", "Console", "sys.stdout.write", "sys.stderr.write"):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {called}")
    assert found == []

"""Records that somebody has made, with the right checksums: nothing is read for them that is not the checkpoint's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from launch import Illada

from illada_megatron.checkpoint.store import _own_checksum, newest_complete

NEWEST = "step_00000002"


@pytest.fixture
def save_dir(two_steps: Path, tmp_path: Path) -> Path:
    """The checkpoints of steps 1 and 2, to be changed."""
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def _record(save_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the newest checkpoint's record, and its checksum with it, as an attacker would."""
    path = save_dir / NEWEST / "checkpoint.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    change(record)
    record["checksum"] = _own_checksum(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "a/../../secret", "", "a\0b", "a\x1b[2Jb"])
def test_files_that_a_record_names_outside_of_the_checkpoint(name: str, save_dir: Path) -> None:
    """Whether they are there, their sizes and checksums would stand in the message."""
    (save_dir.parent / "secret").write_text("secret")
    _record(save_dir, lambda record: record["files"].update({name: {"bytes": 6, "xxh3_128": ""}}))
    info, (refused,) = newest_complete(save_dir)
    assert info is not None
    assert info.step == 1
    assert "not a checkpoint's record" in refused
    assert xxhash.xxh3_128_hexdigest(b"secret") not in refused


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(step="2"),
        lambda record: record.update(step=-1),
        lambda record: record.update(config=[]),
        lambda record: record.update(progress="none"),
        lambda record: record.update(versions={"torch": 2}),
        lambda record: record.update(files={"a": {"bytes": -1, "xxh3_128": ""}}),
        lambda record: record.update(files={"a": {"bytes": 1.5, "xxh3_128": ""}}),
        lambda record: record.update(more=1),
        lambda record: record.pop("config"),
    ],
)
def test_records_of_other_types_are_refused(change: Callable[[dict[str, Any]], object], save_dir: Path) -> None:
    _record(save_dir, change)
    info, (refused,) = newest_complete(save_dir)
    assert info is not None
    assert info.step == 1
    assert "not a checkpoint's record" in refused


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"version": ' + b"9" * 5000 + b"}", b'{"a":' * 100_000, b"[]", b"\xff", b""],
    ids=["nested lists", "a long number", "nested objects", "a list", "no text", "nothing"],
)
def test_records_that_the_library_stumbles_over(content: bytes, save_dir: Path) -> None:
    (save_dir / NEWEST / "checkpoint.json").write_bytes(content)
    info, (refused,) = newest_complete(save_dir)
    assert info is not None
    assert info.step == 1
    assert "checkpoint.json: not " in refused


def test_folders_that_are_nearly_named_like_checkpoints(save_dir: Path) -> None:
    """`²` is a digit to Python's isdigit, and no number to int."""
    for name in ("step_²", "step_", "step_1x", "step_-1", "step_" + "9" * 200):
        (save_dir / name).mkdir()
    info, refused = newest_complete(save_dir)
    assert info is not None
    assert (info.step, len(refused)) == (2, 1)
    assert "step_999" in refused[0]


def test_a_stored_configuration_takes_no_secret_along(
    save_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, illada: Illada
) -> None:
    """Resolved, it would be written into the resharded checkpoint, which goes back to whoever asked for it."""
    monkeypatch.setenv("ILLADA_SECRET", "hunter2")
    _record(save_dir, lambda record: record["config"]["checkpoint"].update(save_dir="/x/${oc.env:ILLADA_SECRET}"))
    for command in (
        ["checkpoint", "reshard", save_dir, tmp_path / "out", "--tp", "1"],
        ["checkpoint", "inspect", save_dir],
        ["convert", "to-hf", save_dir, tmp_path / "out", "--no-tokenizer"],
        ["evaluate", "--checkpoint", save_dir],
    ):
        outcome = illada(*command)
        assert outcome.code == 2, outcome
        assert "nothing in it is resolved" in outcome.err
        assert "hunter2" not in outcome.out + outcome.err
    assert not (tmp_path / "out").exists()


def test_an_export_is_not_changed_by_its_checkpoint(save_dir: Path, tmp_path: Path, illada: Illada) -> None:
    """BUILD on pathlib's class gave it another `read_bytes`, and so another text to the modeling file of an export,
    which its users run."""
    text = b"X" + len(b"read_bytes").to_bytes(4, "little") + b"read_bytes"
    attack = b"cpathlib\nPosixPath\nN}" + text + b"ctorch\nSize\ns\x86b0"  # and POP: what follows is the good pickle
    file = save_dir / NEWEST / ".metadata"
    good = file.read_bytes()
    assert good[:2] == b"\x80\x04"
    file.write_bytes(good[:2] + attack + good[2:])
    entry = {"bytes": len(file.read_bytes()), "xxh3_128": xxhash.xxh3_128_hexdigest(file.read_bytes())}
    _record(save_dir, lambda record: record["files"].update({".metadata": entry}))
    outcome = illada("convert", "to-hf", save_dir, tmp_path / "out", "--no-tokenizer")
    assert outcome.code == 2
    assert "/.metadata: " in outcome.err
    assert not (tmp_path / "out").exists()

"""Files that take another's place: whole, durable, and never through a link that somebody has put there."""

import os
from pathlib import Path

import pytest

from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.config import load_config, save_config
from illada_megatron.data.preprocessing.records import Counts, write_record
from illada_megatron.system import whole_file
from illada_megatron.system.whole_file import replaced
from illada_megatron.training.logs import StepLog

PRECIOUS = "of another user"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "elsewhere"
    file.write_text(PRECIOUS)
    return file


def _log(path: Path) -> None:
    log = StepLog(path, 0, None, continues=False, tell=print)
    log.write({"step": 1})
    log.close()


def _sink(path: Path) -> None:
    sink = LocalFolder(path.parent).create(path.name)
    sink.write(b"ours")
    sink.close()


WRITERS = {
    "a checkpoint's small file": lambda path: LocalFolder(path.parent).replace(path.name, b"ours"),
    "a configuration": lambda path: save_config(load_config("tiny"), path),
    "a record of preprocessing": lambda path: write_record(path, Counts()),
    "a run's log": _log,
}


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_at_the_temporary_name_is_not_followed(writer: str, link: object, victim: Path, tmp_path: Path) -> None:
    """Who may write into the directory knows the name that a file had while it was written."""
    directory = tmp_path / "shared"
    directory.mkdir()
    link(directory / "file.tmp", victim)  # type: ignore[operator]
    WRITERS[writer](directory / "file")
    assert victim.read_text() == PRECIOUS
    assert (directory / "file").stat().st_size > 0


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
@pytest.mark.parametrize("writer", [*list(WRITERS)[:3], "a checkpoint's large file"])
def test_a_link_at_the_name_is_replaced(writer: str, link: object, victim: Path, tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    directory.mkdir()
    link(directory / "file", victim)  # type: ignore[operator]
    {**WRITERS, "a checkpoint's large file": _sink}[writer](directory / "file")
    assert victim.read_text() == PRECIOUS
    assert not (directory / "file").is_symlink()
    assert (directory / "file").stat().st_ino != victim.stat().st_ino


def test_a_name_that_is_taken_is_an_error(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that was guessed."""
    monkeypatch.setattr(whole_file.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "file.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError), replaced(tmp_path / "file") as file:
        file.write(b"ours")
    assert victim.read_text() == PRECIOUS


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(TypeError), replaced(tmp_path / "file") as file:
        file.write("not bytes")  # type: ignore[arg-type]

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replaced(tmp_path / "file") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"

"""Which directory is a checkpoint, without any tensors."""

import json
from pathlib import Path

import pytest

from illada_megatron.checkpoint.store import CheckpointError, finish, newest_complete, step_directory


def _checkpoint(save_dir: Path, step: int) -> Path:
    path = step_directory(save_dir, step)
    (path / "below").mkdir(parents=True)
    (path / "a.distcp").write_bytes(b"12345")
    (path / "below" / "b").write_bytes(b"")
    finish(path, step, {"model": {"num_layers": step}})
    return path


def test_newest_is_by_step_not_by_time_or_pointer(tmp_path: Path) -> None:
    """A pointer that is stale or lost is no reason to lose a checkpoint; steps beyond eight digits still sort."""
    for step in (30, 4):
        _checkpoint(tmp_path, step)
    info, refused = newest_complete(tmp_path)
    assert info is not None
    assert (info.step, info.path, info.config, refused) == (
        30,
        tmp_path / "step_00000030",
        {"model": {"num_layers": 30}},
        [],
    )
    (tmp_path / "latest").unlink()
    assert newest_complete(tmp_path)[0] == info


def test_pointer_names_what_was_finished_last(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 4)
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
    _checkpoint(tmp_path, 30)
    assert (tmp_path / "latest").read_text() == "step_00000030\n"
    assert not list(tmp_path.rglob("*.tmp"))


def test_record_holds_every_file(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 4)
    assert json.loads((path / "checkpoint.json").read_text())["files"] == {"a.distcp": 5, "below/b": 0}


def test_one_checkpoint_may_be_named_itself(tmp_path: Path) -> None:
    old, _ = _checkpoint(tmp_path, 4), _checkpoint(tmp_path, 30)
    info, _ = newest_complete(old)
    assert info is not None
    assert info.step == 4


def test_steps_of_more_than_eight_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        _checkpoint(tmp_path, step)
    info, _ = newest_complete(tmp_path)
    assert info is not None
    assert info.step == 100_000_000


def test_other_things_in_the_directory_are_ignored(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 4)
    (tmp_path / "step_notes.txt").write_text("mine")
    (tmp_path / "events.out").write_text("x")
    info, _ = newest_complete(tmp_path)
    assert info is not None
    assert info.step == 4


def test_named_checkpoint_that_was_interrupted(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 4)
    (path / "checkpoint.json").unlink()
    info, refused = newest_complete(path)
    assert info is None
    assert "interrupted" in refused[0]


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory; give checkpoint\.load_dir"):
        newest_complete(tmp_path / "nowhere")

"""Which directory is a checkpoint, without any tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.integrity import FileRecord
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.retention import prune
from illada_megatron.checkpoint.store import finish, move_pointer, newest_complete, step_directory


def _checkpoint(save_dir: Path, step: int, **progress: Any) -> Path:
    path = step_directory(folder(save_dir), step)
    path.make()
    files = {}
    for name, content in (("a.distcp", b"12345"), ("b", b"")):
        sink = path.create(name)
        sink.write(content)
        sink.close()
        files[name] = FileRecord(bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))
    finish(path, step, {"model": {"num_layers": step}}, {"step": step, **progress}, files, {"tokenizer": "mine"})
    move_pointer(path)
    return save_dir / path.name


def test_newest_is_by_step_not_by_time_or_pointer(tmp_path: Path) -> None:
    """A pointer that is stale or lost is no reason to lose a checkpoint; steps beyond eight digits still sort."""
    for step in (30, 4):
        _checkpoint(tmp_path, step)
    info, refused = newest_complete(tmp_path)
    assert info is not None
    assert (info.step, str(info.path), refused) == (30, f"{tmp_path}/step_00000030", [])
    assert (info.config, info.progress) == ({"model": {"num_layers": 30}}, {"step": 30})
    assert info.fingerprints == {"tokenizer": "mine"}
    # the package's version may lack the "+cu130" of torch's own
    assert info.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    (tmp_path / "latest").unlink()
    assert newest_complete(tmp_path)[0].step == 30  # type: ignore[union-attr]


def test_pointer_names_what_was_finished_last(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 4)
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
    _checkpoint(tmp_path, 30)
    assert (tmp_path / "latest").read_text() == "step_00000030\n"
    assert not list(tmp_path.rglob("*.tmp"))


def test_record_holds_every_file(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 4)
    files = json.loads((path / "checkpoint.json").read_text())["files"]
    assert {name: record["bytes"] for name, record in files.items()} == {"a.distcp": 5, "b": 0}
    assert files["b"]["xxh3_128"] == "99aa06d3014798d86001c324468d497f"  # of nothing


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_every_flipped_bit_is_found(bit: int, tmp_path: Path) -> None:
    """In any byte of the data and of the record."""
    path = _checkpoint(tmp_path, 4)
    for name in ("a.distcp", "checkpoint.json"):
        file = path / name
        content = file.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match="no intact checkpoint"):
                newest_complete(tmp_path)
        file.write_bytes(content)
    info, refused = newest_complete(tmp_path)
    assert info is not None
    assert not refused


def test_checksums_may_be_left_out(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 4)
    (path / "a.distcp").write_bytes(b"12346")
    info, _ = newest_complete(tmp_path, checksums=False)
    assert info is not None
    with pytest.raises(CheckpointError, match=r"a\.distcp: its bytes have changed: checksum \w+, expected \w+"):
        newest_complete(tmp_path)


def _left(save_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in save_dir.glob("step_*"))


def _prune(
    save_dir: Path, saved: list[int], base: int | None, keep_last: int | None, keep_every: int | None
) -> list[str]:
    """All but the last was there before."""
    there = [int(path.name.removeprefix("step_")) for path in save_dir.glob("step_*")]
    return prune(folder(save_dir), saved, base, {*there} - {*saved}, saved, keep_last, keep_every)


def test_what_another_attempt_saves_is_not_touched(tmp_path: Path) -> None:
    """A rank 0 that was cut off looks at who owns the directory, hangs, and goes on when its successor has saved."""
    for step in (5, 10, 20, 30):
        _checkpoint(tmp_path, step)
    step_directory(folder(tmp_path), 40).make()  # the successor is at it
    assert prune(folder(tmp_path), [10], 5, {5}, {10}, 1, None) == []
    assert _left(tmp_path) == [10, 20, 30, 40]


def test_what_the_run_went_back_behind_goes_and_what_was_there_stays(tmp_path: Path) -> None:
    """Begun with load_dir's weights beside an older run's checkpoints, saved 4 and 5, went back, saved 4 again."""
    for step in (4, 5, 1000):
        _checkpoint(tmp_path, step)
    assert prune(folder(tmp_path), [4], None, {1000}, {4, 5}, 1, None) == []
    assert _left(tmp_path) == [4, 1000]


def test_what_is_not_kept_goes(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        _checkpoint(tmp_path, step)
    for step in (35, 60):  # interrupted: whether others are kept or not, nobody will ever complete them
        step_directory(folder(tmp_path), step).make()
    assert _prune(tmp_path, [50], 40, None, 20) == []
    assert _left(tmp_path) == [10, 20, 30, 40, 50]
    assert _prune(tmp_path, [50], 40, 2, 20) == []
    assert _left(tmp_path) == [20, 40, 50]
    assert _prune(tmp_path, [50], 40, 1, None) == []
    assert _left(tmp_path) == [50]
    assert newest_complete(tmp_path)[0].step == 50  # type: ignore[union-attr]


def test_what_was_just_saved_stays(tmp_path: Path) -> None:
    """After a fall-back those that were refused are newer. They are complete, and neither count nor stay."""
    for step in (10, 20, 30, 25):
        _checkpoint(tmp_path, step)
    assert _prune(tmp_path, [25], 20, 1, 20) == []
    assert _left(tmp_path) == [20, 25]


@pytest.mark.parametrize("keep_last", [1, None])
def test_steps_that_are_done_again_are_no_checkpoints(keep_last: int | None, tmp_path: Path) -> None:
    """Went on from 10, at another interval than the refused ones: a restart would return to what was left behind."""
    for step in (10, 20, 30, 25, 40):
        _checkpoint(tmp_path, step)
    assert _prune(tmp_path, [25], 10, keep_last, None) == []
    assert _left(tmp_path) == ([25] if keep_last else [10, 25])


def test_a_run_that_found_nothing_leaves_what_is_newer(tmp_path: Path) -> None:
    """A file system that was mounted late: it is not this run's to delete."""
    for step in (5, 10, 1000):
        _checkpoint(tmp_path, step)
    step_directory(folder(tmp_path), 2000).make()
    assert _prune(tmp_path, [10], None, 1, None) == []
    assert _left(tmp_path) == [10, 1000]


def test_what_cannot_be_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for step in (10, 20):
        _checkpoint(tmp_path, step)
    monkeypatch.setattr("shutil.rmtree", refuse)
    (failure,) = _prune(tmp_path, [20], 10, 1, None)
    assert "step_00000010 could not be deleted" in failure
    assert newest_complete(tmp_path)[0].step == 20  # type: ignore[union-attr]


def test_what_cannot_be_looked_at_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends nothing: the newest is complete."""
    size = LocalFolder.size

    def fail(place: LocalFolder, name: str) -> int | None:
        if place.name == "step_00000010":
            raise OSError(5, "Input/output error", str(place))
        return size(place, name)

    for step in (10, 15, 20):
        _checkpoint(tmp_path, step)
    monkeypatch.setattr(LocalFolder, "size", fail)
    (failure,) = _prune(tmp_path, [20], 15, 1, None)
    assert "step_00000010 could not be deleted: [Errno 5]" in failure
    assert _left(tmp_path) == [10, 20]


def _failing(calls: int, monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """The first reads of a file fail, as a bad cable's or a busy server's do; returns what was asked for."""
    read, asked = LocalFolder.read_into, list[str]()

    def fail(place: LocalFolder, file: str, offset: int, out: memoryview) -> None:
        if place.name == name:
            asked.append(file)
            if len(asked) <= calls:
                raise OSError(5, "Input/output error", f"{place}/{file}")
        read(place, file, offset, out)

    monkeypatch.setattr(LocalFolder, "read_into", fail)
    monkeypatch.setattr("illada_megatron.checkpoint.files.patience._PAUSES_SECONDS", (0.0, 0.0))
    return asked


def test_a_read_that_fails_once_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to count as damage: the run went back a checkpoint without a word, and wrote over the good one."""
    for step in (10, 20):
        _checkpoint(tmp_path, step)
    asked = _failing(2, monkeypatch, "step_00000020")
    info, refused = newest_complete(tmp_path)
    assert info is not None
    assert (info.step, refused) == (20, [])
    assert asked == ["a.distcp"] * 3


def test_what_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither older ones nor none at all are taken for it; the launcher tries again."""
    for step in (10, 20):
        _checkpoint(tmp_path, step)
    _failing(1000, monkeypatch, "step_00000020")
    with pytest.raises(OSError, match=r"step_00000020: cannot be read now, .*Input/output error.*start the run again"):
        newest_complete(tmp_path)


def test_a_record_that_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(place: LocalFolder, name: str) -> bytes:
        raise OSError(116, "Stale file handle", f"{place}/{name}")

    _checkpoint(tmp_path, 10)
    monkeypatch.setattr(LocalFolder, "read", fail)
    monkeypatch.setattr("illada_megatron.checkpoint.files.patience._PAUSES_SECONDS", (0.0, 0.0))
    with pytest.raises(OSError, match="Stale file handle"):
        newest_complete(tmp_path)


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
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory, expected an earlier run"):
        newest_complete(tmp_path / "nowhere")


def test_none_of_a_row_of_bad_steps(tmp_path: Path) -> None:
    """Where a run goes back, such a checkpoint is none to go back to, and no damaged one either; a restart takes it."""
    _checkpoint(tmp_path, 20, bad_steps={"streak": [{"step": 20}]})
    assert newest_complete(tmp_path)[0].step == 20  # type: ignore[union-attr]
    assert newest_complete(tmp_path, good=True) == (
        None,
        [f"{tmp_path}/step_00000020: was saved in a row of bad steps"],
    )
    _checkpoint(tmp_path, 10, bad_steps={"streak": []})
    assert newest_complete(tmp_path, good=True)[0].step == 10  # type: ignore[union-attr]

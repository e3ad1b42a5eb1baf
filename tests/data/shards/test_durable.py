"""Names are given once, and a directory that cannot be flushed is no reason to fail."""

import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.records import Counts, read_record, write_record
from illada_megatron.data.shards import durable
from illada_megatron.data.shards.durable import publish, write_whole
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, read_manifest, write_manifest

MANIFEST = Manifest(vocab_size=10, shards=(ShardEntry(path="a", dtype="uint16", tokens=1, documents=1),))


def _refuse_directories(monkeypatch: pytest.MonkeyPatch, error_number: int) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error_number, os.strerror(error_number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)


def test_a_file_system_that_cannot_flush_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_shard
) -> None:
    """Some network file systems say EINVAL; all writers of the data side take it alike. Other errors are errors."""
    _refuse_directories(monkeypatch, errno.EINVAL)
    write_manifest(MANIFEST, tmp_path / "m.json")
    assert read_manifest(tmp_path / "m.json") == MANIFEST
    write_record(tmp_path / "r.json", Counts(documents=1))
    assert read_record(tmp_path / "r.json", Counts) == Counts(documents=1)
    assert IndexedDataset(write_shard("shard", [[1, 2]])).num_tokens == 2
    monkeypatch.undo()
    _refuse_directories(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as error:
        write_manifest(MANIFEST, tmp_path / "other.json")
    assert error.value.filename == str(tmp_path)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    for content, refused in ((b"first", False), (b"first", False), (b"other", True)):
        temporary = tmp_path / "t.tmp"
        temporary.write_bytes(content)
        if refused:
            with pytest.raises(DataError, match=r"x: there already \(5 bytes\), and not what was to be written here"):
                publish(temporary, tmp_path / "x")
        else:
            publish(temporary, tmp_path / "x")
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"first")]


def test_a_failed_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "x", b"old")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


@pytest.mark.parametrize("error_number", [errno.EPERM, errno.EACCES, errno.EINVAL, errno.EXDEV, errno.ENOTTY, 524])
@pytest.mark.parametrize("renames_once", [True, False])
def test_a_file_system_without_hard_links(
    error_number: int, renames_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr(os, "link", refuse)
    if not renames_once:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    test_a_name_is_given_once(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "t.tmp").write_bytes(b"content")
    with pytest.raises(FileExistsError):
        durable.name_once(tmp_path / "t.tmp", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def test_of_two_writers_without_hard_links_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the other one comes between looking and renaming: the kernel does both at once."""

    def refuse(_: object, path: Path) -> None:
        path.write_bytes(b"of the other")
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    (tmp_path / "t.tmp").write_bytes(b"content")
    with pytest.raises(DataError, match="there already"):
        publish(tmp_path / "t.tmp", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"of the other"


@pytest.mark.parametrize("error_number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE])
def test_a_disk_that_fails_is_no_file_system_without_links(
    error_number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr(os, "link", fail)
    (tmp_path / "t.tmp").write_bytes(b"content")
    with pytest.raises(OSError, match=os.strerror(error_number)):
        publish(tmp_path / "t.tmp", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []

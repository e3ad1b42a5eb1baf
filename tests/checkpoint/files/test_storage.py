"""Files written past the page cache: any length, on file systems that can and cannot, with disks that take less."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from illada_megatron.checkpoint.files.local_files import LocalFolder

BUFFER = 4 << 20
SIZES = (0, 1, 4095, 4096, BUFFER - 1, BUFFER, BUFFER + 1, 3 * BUFFER + 513)


def _blocks(size: int) -> Iterator[bytes]:
    """Bytes of blocks that fit no buffer."""
    content = os.urandom(size)
    for start in range(0, size, 700_001):
        yield content[start : start + 700_001]


def _written(folder: Path, size: int) -> tuple[bytes, bytes]:
    """(what was written, what the file holds)."""
    blocks = list(_blocks(size))
    sink = LocalFolder(folder).create("file")
    for block in blocks:
        sink.write(block)
    sink.close()
    return b"".join(blocks), (folder / "file").read_bytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("memory", [False, True], ids=["disk", "tmpfs"])
def test_a_file_is_what_was_written(size: int, memory: bool, tmp_path: Path) -> None:
    folder = Path("/dev/shm") / tmp_path.name if memory else tmp_path
    folder.mkdir(exist_ok=True)
    try:
        wanted, found = _written(folder, size)
        assert found == wanted
    finally:
        if memory:
            (folder / "file").unlink(missing_ok=True)
            folder.rmdir()


def test_a_file_system_that_refuses_to_open_it_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = [], os.open

    def refuse(path: object, flags: int, mode: int = 0o777) -> int:
        opened.append(bool(flags & os.O_DIRECT))
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(os, "open", refuse)
    wanted, found = _written(tmp_path, 2 * BUFFER + 9)
    assert found == wanted
    assert opened[:2] == [True, False]


def test_a_file_system_that_refuses_to_write_it_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from there on goes through the cache; another error is the caller's."""
    direct, real = [], os.write

    def refuse(descriptor: int, block: memoryview) -> int:
        direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        if direct[-1] and len(direct) > 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, block[: 1 << 20])  # less than it was given

    monkeypatch.setattr(os, "write", refuse)
    wanted, found = _written(tmp_path, 2 * BUFFER + 9)
    assert found == wanted
    assert direct[:2] == [True, True]
    assert not any(direct[2:])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        _written(tmp_path, BUFFER)

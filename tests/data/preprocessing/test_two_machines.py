"""Jobs under one prefix on several machines: a lock that only one of them sees is none, and looks like one."""

import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards import prefix_lock
from illada_megatron.data.shards.inspect import verify_shard
from illada_megatron.data.shards.shard_list import find_shards


def _whole(prefix: Path) -> bool:
    """The manifest is there, and every shard is what it says."""
    shards = find_shards([f"{prefix}.manifest.json"])
    return [problem for shard in shards for problem in verify_shard(shard)] == []


TWO_MACHINES = """
import fcntl, platform, sys
from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing import records
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess
from illada_megatron.data.shards import prefix_lock
source, prefix, tokenizer, host, seconds, shard, overwrite = sys.argv[1:]
fcntl.flock = lambda *_: None
platform.node = lambda: host
prefix_lock._TOUCHED_SECONDS, prefix_lock._DEAD_SECONDS = 0.2, float(seconds)
require_claim, left = records.require_claim, int(shard)
def require_slowly(job):
    global left
    require_claim(job)
    left -= 1
    if left == 0:
        print("at work", flush=True)
        sys.stdin.readline()
records.require_claim = require_slowly
options = PreprocessOptions(
    shard_mb=0.3, workers=1, tokenizer_engine="reference", log_interval_seconds=0, overwrite=overwrite == "overwrite"
)
try:
    preprocess([source], prefix, tokenizer, options)
except DataError as error:
    sys.exit(str(error))
"""


def _start_on(
    host: str, arguments: list[Path], seconds: float, shard: int = 0, overwrite: str = "no"
) -> subprocess.Popen[str]:
    """A job on a machine whose locks other machines do not see; it waits for a line before that shard is published."""
    run = [sys.executable, "-c", TWO_MACHINES, *map(str, arguments), host, str(seconds), str(shard), overwrite]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(run, text=True, env=environment, **pipes)  # type: ignore[call-overload,no-any-return]


def _at_work(job: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """It waits there."""
    assert job.stdout is not None
    assert job.stdout.readline() == "at work\n"
    return job


@pytest.mark.parametrize("overwrite", ["no", "overwrite"])
@pytest.mark.parametrize("host", ["second", "first"])
def test_a_job_where_locks_hold_on_one_machine_only(
    host: str, overwrite: str, jsonl: Path, sentencepiece_path: Path, tmp_path: Path
) -> None:
    """The other one touches nothing, whether it is to overwrite or not, and says who is at work."""
    arguments = [jsonl, tmp_path / "out", sentencepiece_path]
    first = _at_work(_start_on("first", arguments, 600, shard=2))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert any(name.endswith(".done.json") for name in before)
    assert any(re.fullmatch(r"out_\d+\.bin\.\w+\.tmp", name) for name in before)
    second = _start_on(host, arguments, 600, overwrite=overwrite)
    _, said = second.communicate()
    assert second.returncode == 1
    assert re.search(rf"out\.lock\.json: process {first.pid} on first, which .* since 20.*, is at work.*remove", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    _, said = first.communicate("\n")
    assert first.returncode == 0, said
    assert _whole(tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".lock.json"))]


@pytest.mark.parametrize("host", ["second", "first"])
def test_a_killed_job_goes_on_on_another_machine(
    host: str, jsonl: Path, sentencepiece_path: Path, tmp_path: Path
) -> None:
    """When its note has not been touched for some time; at once on the machine that it was on."""
    arguments = [jsonl, tmp_path / "out", sentencepiece_path]
    first = _at_work(_start_on("first", arguments, 1, shard=2))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert list(tmp_path.glob("*.tmp"))
    second = _start_on(host, arguments, 1)
    _, said = second.communicate()
    assert second.returncode == 0, said
    assert ("looking for up to 1 s whether it is alive" in said) == (host == "second")
    assert _whole(tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".lock.json"))]


def test_a_job_that_has_lost_its_prefix_gives_up_nothing_of_the_other(
    jsonl: Path, sentencepiece_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped for a while, on another machine: taken for dead, it fails, and the other one goes on."""
    arguments = [jsonl, tmp_path / "out", sentencepiece_path]
    first = _at_work(_start_on("first", arguments, 1, shard=1))
    first.send_signal(signal.SIGSTOP)
    second = _at_work(_start_on("second", arguments, 1, shard=1))
    before = sorted(path.name for path in tmp_path.iterdir())
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate("\n")
    assert "was removed before it got its name" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "out.job.json" in before
    _, said = second.communicate("\n")
    assert second.returncode == 0, said
    assert _whole(tmp_path / "out")


def test_of_two_that_take_over_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note that is not the one that was found dead is put back."""
    monkeypatch.setattr(prefix_lock, "_DEAD_SECONDS", 0.1)
    monkeypatch.setattr(platform, "node", lambda: "first")
    with prefix_lock.locked_prefix(str(tmp_path / "out")) as lock, lock.noted():
        note = (tmp_path / "out.lock.json").read_bytes()
    (tmp_path / "out.lock.json").write_bytes(note)
    monkeypatch.setattr(platform, "node", lambda: "second")
    newer = note.replace(b"first", b"third")
    take_away = prefix_lock.PrefixLock._take_away

    def too_late(self: prefix_lock.PrefixLock, found: bytes) -> None:
        if found == note:
            (tmp_path / "out.lock.json").write_bytes(newer)
        take_away(self, found)
        if found == note:
            assert (tmp_path / "out.lock.json").read_bytes() == newer

    monkeypatch.setattr(prefix_lock.PrefixLock, "_take_away", too_late)
    with prefix_lock.locked_prefix(str(tmp_path / "out")) as lock, lock.noted():
        assert lock.is_ours()
    assert [path.name for path in tmp_path.iterdir()] == ["out.lock"]


def test_a_lock_that_leads_elsewhere_or_is_a_colleagues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"out\.lock: is a link, expected a file or nothing: remove it"):
        prefix_lock.locked_prefix(str(tmp_path / "out")).__enter__()
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "out.lock").unlink()
    (tmp_path / "out.lock").touch()
    system_open = os.open

    def not_for_writing(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if str(path).endswith(".lock") and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return system_open(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", not_for_writing)
    with prefix_lock.locked_prefix(str(tmp_path / "out")) as lock:
        assert lock.works
        with pytest.raises(DataError, match="another process is making this corpus"):
            prefix_lock.locked_prefix(str(tmp_path / "out")).__enter__()

    def no_writing(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", no_writing)
    with pytest.raises(DataError, match=r"out\.lock: may not be written by this user: let its owner do `chmod a\+rw`"):
        prefix_lock.locked_prefix(str(tmp_path / "out")).__enter__()

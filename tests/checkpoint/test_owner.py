"""Two attempts on one save_dir: the second takes over, the first notices and leaves everything alone."""

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from launch import ROOT, wait_for_step

from illada_megatron.checkpoint import owner
from illada_megatron.checkpoint.files import patience
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.storage import Folder, folder
from illada_megatron.checkpoint.owner import OWNER, Ownership, TakenOverError
from illada_megatron.checkpoint.store import newest_complete
from illada_megatron.system import process


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "SILENT_SECONDS", 3.0)


def _newcomer(place: Folder, **who: str | int) -> Ownership:
    """On another machine than those before, where `who` does not say."""
    ownership = Ownership(
        place, replace(owner._new_owner(), **{"host": (name := secrets.token_hex(4)), "machine": name, **who}), print
    )  # type: ignore[arg-type]
    ownership.take()
    ownership.require()
    return ownership


@pytest.mark.parametrize("where", ["disk", "object storage"])
def test_the_last_who_comes_owns_it(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = folder(tmp_path / "new" if where == "disk" else f"{request.getfixturevalue('s3')}/owned")
    first, second = _newcomer(place), _newcomer(place)
    second.require()
    name = second.owner.attempt
    with pytest.raises(TakenOverError, match=f"another run has taken it over .attempt {name}, on ") as raised:
        first.require()
    assert not raised.value.same_run
    place.remove(OWNER)  # somebody cleared the directory: whose turn it is says who comes first
    second.require()
    with pytest.raises(TakenOverError):
        first.require()
    place.replace(OWNER, b"\0" * 20)
    with pytest.raises(OSError, match="names no owner"):  # no other's name: a restart mends it
        second.require()
    _newcomer(place).require()


def test_numbers_of_processes_say_nothing_where_the_machine_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two containers without boot_id the run may be process 1 of both."""
    place = folder(tmp_path / "new")
    _newcomer(place, machine="", pid=1)
    assert "waiting" not in capsys.readouterr().out
    _newcomer(place, machine="", pid=1)
    assert "waiting" in capsys.readouterr().out


def test_the_file_of_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no machine, but says that it has ended."""
    place = folder(tmp_path / "new")
    place.make()
    old = {**asdict(owner._new_owner()), "ended": True}
    del old["machine"], old["started"]
    place.replace(OWNER, json.dumps(old).encode())
    _newcomer(place)
    assert "waiting" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "value", "same_run"),
    [("TORCHELASTIC_RUN_ID", "ours", True), ("SLURM_JOB_ID", "7", True), ("TORCHELASTIC_RUN_ID", "none", False)],
)
def test_a_newer_attempt_of_the_same_run(
    variable: str, value: str, same_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher of a rank 0 that was cut off may start it again: it joins the others. torchrun's "none" is every
    run's name."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    place = folder(tmp_path)
    first, _ = _newcomer(place), _newcomer(place)
    with pytest.raises(TakenOverError) as raised:
        first.require()
    assert raised.value.same_run is same_run


def test_another_run_is_refused_where_the_first_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trial on one machine with the configuration of a thousand GPUs must not end them."""
    place = folder(tmp_path)
    monkeypatch.setattr(owner, "SIGN_SECONDS", 0.5)
    alive = _newcomer(place)
    with pytest.raises(CheckpointError, match=f"another run is saving there .attempt {alive.owner.attempt}, on "):
        _newcomer(place)
    alive.require()
    assert "waiting 3 s for a sign of its life" in capsys.readouterr().out
    alive.end()
    assert json.loads((tmp_path / OWNER).read_text())["ended"]
    begin = time.monotonic()
    monkeypatch.setattr(owner, "SIGN_SECONDS", 1000.0)
    killed = _newcomer(place)
    assert "waiting" not in capsys.readouterr().out
    _newcomer(place, machine=killed.owner.machine, pid=killed.owner.pid)  # of one process
    assert "waiting" not in capsys.readouterr().out
    _newcomer(place)  # from another machine nobody can tell whether it lives: it gives no sign
    assert "waiting" in capsys.readouterr().out
    assert time.monotonic() - begin >= 3.0
    with pytest.raises(TakenOverError):
        killed.require()


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves, and gives signs of its life meanwhile: the next job of a chain has come a little early."""
    place = folder(tmp_path)
    monkeypatch.setattr(owner, "SIGN_SECONDS", 0.2)
    monkeypatch.setattr(owner, "SILENT_SECONDS", 60.0)
    first = _newcomer(place)
    ending = threading.Timer(2.5, first.end)
    ending.start()
    second = _newcomer(place)
    ending.join()
    second.require()
    second.end()


def test_numbers_of_processes_say_nothing_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a container beside this one, with the same host's name: its process 1 is not this one's."""
    place, pid = folder(tmp_path), os.getppid()
    alive = {"host": platform.node(), "machine": process.machine(), "pid": pid, "started": process.started(pid)}
    for other in ({**alive, "machine": "another namespace", "pid": 2**22}, alive):
        ownership = _newcomer(place, **other)
        ownership.end()
        (tmp_path / OWNER).write_text(json.dumps({**asdict(ownership.owner), "of_a_later_version": 1}))
        begin = time.monotonic()
        _newcomer(place).end()
        assert time.monotonic() - begin >= 3.0
    gone = _newcomer(place, **{**alive, "started": "1"})  # its number is another's now
    gone.end()
    (tmp_path / OWNER).write_text(json.dumps(asdict(gone.owner)))
    ours = Ownership(place, replace(owner._new_owner(), run="another"), pytest.fail)
    ours.take()
    ours.require()
    ours.end()


def test_a_disk_that_does_not_answer_while_it_waits_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that cannot read the other's signs looks again before it writes, and does not take over meanwhile."""
    place = folder(tmp_path)
    monkeypatch.setattr(owner, "SIGN_SECONDS", 0.5)
    monkeypatch.setattr(patience, "_PAUSES_SECONDS", (0.0, 0.0))
    alive = _newcomer(place)
    read, left = LocalFolder.read, [1, 0, 0, 0]  # the first look succeeds, those while it waits do not

    def fail(folder: LocalFolder, name: str) -> bytes:
        if threading.current_thread() is threading.main_thread() and left and not left.pop(0):
            raise OSError(5, "Input/output error", name)
        return read(folder, name)

    monkeypatch.setattr(LocalFolder, "read", fail)
    other = Ownership(place, replace(owner._new_owner(), machine="another"), print)
    other.take()
    assert left == []
    with pytest.raises(CheckpointError, match="another run is saving there"):
        other.require()
    alive.require()
    other.end()
    alive.end()
    assert json.loads((tmp_path / OWNER).read_text())["attempt"] == alive.owner.attempt


def test_two_runs_on_one_save_dir(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """Started by mistake, while the first goes on saving: it is refused, with a code that no launcher answers with a
    restart. Where the first gives no sign of life it is taken over, and ends when it is back."""
    save_dir, jsonl = tmp_path / "checkpoints", tmp_path / "steps.jsonl"
    # all are kept: one that the second has begun to load would go otherwise, and it could not start
    arguments = [*tiny_run, f"checkpoint.save_dir={save_dir}", "checkpoint.interval_steps=20"]
    arguments += ["training.train_steps=1000000", "logging.interval_steps=1000"]
    code = """
        import platform, sys
        from illada_megatron.checkpoint import owner
        owner.SIGN_SECONDS, owner.SILENT_SECONDS = float(sys.argv[1]), 10.0
        host = sys.argv[2]
        platform.node = lambda: host
        sys.argv = ["illada", "train", *sys.argv[3:]]
        from illada_megatron.__main__ import program
        program()
    """

    def start(sign_seconds: float, host: str, *more: str) -> "subprocess.Popen[str]":
        line = [sys.executable, "-c", textwrap.dedent(code), str(sign_seconds), host, *arguments, *more]
        return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    first = start(1.0, "one", f"logging.jsonl_path={jsonl}")
    second = None
    try:
        wait_for_step(jsonl, 25, psutil.Process(first.pid))
        refused = start(1.0, "two")
        _, errors = refused.communicate()
        assert refused.returncode == 2, errors
        assert "another run is saving there" in errors
        assert first.poll() is None
        os.kill(first.pid, signal.SIGSTOP)
        second = start(1.0, "two", f"logging.jsonl_path={tmp_path / 'second.jsonl'}")
        wait_for_step(tmp_path / "second.jsonl", 1, psutil.Process(second.pid))
        os.kill(first.pid, signal.SIGCONT)
        _, errors = first.communicate()
        assert first.returncode == 2, errors
        assert "another run has taken it over" in errors
        assert "give each run a checkpoint.save_dir of its own" in errors
        second.terminate()
        _, errors = second.communicate()
        assert second.returncode == 0, errors
    finally:
        first.kill()
        if second is not None:
            second.kill()
    info, problems = newest_complete(save_dir)
    assert info is not None
    assert problems == []
    attempt = json.loads((save_dir / OWNER).read_text())["attempt"]
    assert f"__0_{attempt}.distcp" in info.files

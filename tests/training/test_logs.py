"""What a run does when its logs cannot be written, or hold what it did not write: it goes on, and erases nothing of
another's."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import ROOT, Illada, read_steps

from illada_megatron.training.logs import StepLog


def _run(
    arguments: list[str], stdout: int | None = None, prepare: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """`illada train ARGUMENTS` in a process of its own; prepare: called in it before."""
    return subprocess.run(
        [sys.executable, "-m", "illada_megatron", "train", *arguments],
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=prepare,
    )


def _logged(path: Path) -> list[int]:
    return [step["step"] for step in read_steps(path)]


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 700, b"\0" * 700 + b"\n", b'{"step": 3, "lo', b'\0\n{"step": 2}\n', b"[3]\n", b'{"a": 1}\n'],
    ids=["zeros", "a line of zeros", "cut short", "zeros between", "no object", "no step"],
)
def test_a_log_that_a_power_loss_has_damaged(
    tail: bytes, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """The run goes on. The log ends before the first bad line, and goes on there, in the same file."""
    jsonl = tmp_path / "steps.jsonl"
    arguments = [*tiny_run, f"checkpoint.save_dir={tmp_path / 'save'}", f"logging.jsonl_path={jsonl}"]
    assert illada("train", *arguments, "training.exit_steps=2").code == 0
    good = jsonl.read_bytes()
    with jsonl.open("ab") as file:
        file.write(tail)
    inode = jsonl.stat().st_ino
    again = illada("train", *arguments)
    assert again.code == 0, again.err
    assert _logged(jsonl) == [1, 2, 3]
    assert jsonl.read_bytes().startswith(good)
    assert jsonl.stat().st_ino == inode
    assert len(list(tmp_path.glob("steps.jsonl*"))) == 1


def test_a_log_that_is_not_to_be_continued_is_put_aside(
    tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """A file that is no log, one of a run without a name, one of a start that left no checkpoint: nothing of what was
    there is lost. A run goes on in its own log. One that branches off from a checkpoint of another, or has no name,
    never takes the log of a run that has one."""
    jsonl, first, second = tmp_path / "steps.jsonl", tmp_path / "first", tmp_path / "second"
    arguments = [*tiny_run, f"logging.jsonl_path={jsonl}"]
    jsonl.write_text("what somebody wrote here\n")
    assert illada("train", *arguments, f"checkpoint.save_dir={first}", "training.exit_steps=1").code == 0
    assert (tmp_path / "steps.jsonl.1").read_text() == "what somebody wrote here\n"
    assert illada("train", *arguments, f"checkpoint.save_dir={first}").code == 0
    assert _logged(jsonl) == [1, 2, 3]

    before = jsonl.read_bytes()
    branch = [*arguments, f"checkpoint.save_dir={second}", f"checkpoint.load_dir={first}/step_00000001"]
    for other in (branch, arguments):
        refused = illada("train", *other, "training.exit_steps=2")
        assert refused.code == 2
        assert f"logging.jsonl_path {jsonl} belongs to another run, {first}" in refused.err
    assert jsonl.read_bytes() == before
    assert not second.exists()

    shutil.rmtree(first)  # the run begins anew
    again = illada("train", *arguments, f"checkpoint.save_dir={first}", "training.exit_steps=1")
    assert again.code == 0, again.err
    assert "steps.jsonl held the steps of another run, or of a start of this one" in again.out
    assert (tmp_path / "steps.jsonl.2").read_bytes() == before
    unnamed = [*tiny_run, f"logging.jsonl_path={tmp_path / 'unnamed.jsonl'}"]
    for _ in range(2):  # without a save_dir each start is a new run
        assert illada("train", *unnamed, "training.exit_steps=2").code == 0
    assert _logged(tmp_path / "unnamed.jsonl.1") == _logged(tmp_path / "unnamed.jsonl") == [1, 2]


def test_no_log_can_be_written(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """Files may have 100 bytes: the log, TensorBoard's and the terminal's, which is a file, fail in the middle of a
    line. The run takes its three steps, ends with 0, and has said so where that was still possible."""
    said = tmp_path / "stdout"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    places = [f"logging.jsonl_path={tmp_path / 'steps.jsonl'}", f"logging.tensorboard_dir={tmp_path / 'board'}"]
    with said.open("w") as stdout:
        run = _run([*tiny_run, *places], stdout.fileno(), small_files)
    assert run.returncode == 0, run.stderr
    assert said.stat().st_size <= 100
    assert (tmp_path / "steps.jsonl").stat().st_size == 0  # of a line that was cut short nothing stays
    run = _run([*tiny_run, *places], prepare=small_files)
    assert run.returncode == 0, run.stderr
    assert "step       3/3  loss" in run.stdout
    for name in ("jsonl_path", "tensorboard_dir"):
        assert run.stdout.count(f"warning: logging.{name} {tmp_path}") == 1
    assert "File too large; the run goes on" in run.stdout


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_nobody_reads_the_terminal(kind: str, tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """Standard output on a full disk, or a pipe whose reader is gone: all steps are in the log, and the exit code is
    0, also when Python writes what is left in its buffers."""
    jsonl = tmp_path / "steps.jsonl"
    if kind == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    run = _run([*tiny_run, f"logging.jsonl_path={jsonl}"], stdout)
    os.close(stdout)
    assert run.returncode == 0, run.stderr
    assert _logged(jsonl) == [1, 2, 3]


def test_a_log_on_a_full_disk(tiny_run: tuple[str, ...], illada: Illada) -> None:
    run = illada("train", *tiny_run, "logging.jsonl_path=/dev/full")
    assert run.code == 0, run.err
    assert run.out.count("warning: logging.jsonl_path /dev/full: [Errno 28] No space left on device") == 1


@pytest.mark.parametrize("field", ["jsonl_path", "tensorboard_dir"])
def test_a_path_that_can_never_be_written(
    field: str, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """An error where a run begins, for the user to correct; a warning where one goes on that has something to lose."""
    (tmp_path / "file").write_text("")
    place = f"logging.{field}={tmp_path / 'file' / 'log'}"
    arguments = [*tiny_run, f"checkpoint.save_dir={tmp_path / 'save'}"]
    refused = illada("train", *arguments, place)
    assert refused.code == 2
    assert f"{place.replace('=', ' ')}: cannot be written: {tmp_path / 'file'} is a file" in refused.err
    assert illada("train", *arguments, "training.exit_steps=1").code == 0
    run = illada("train", *arguments, place)
    assert run.code == 0, run.err
    assert run.out.count(f"warning: logging.{field} {tmp_path / 'file' / 'log'}: ") == 1


def test_a_log_goes_on_when_the_disk_has_room_again(tmp_path: Path) -> None:
    """A line that the full disk has cut short is written over. Every line can be read; which are missing is said."""
    path = tmp_path / "steps.jsonl"
    code = f"""
        import resource
        from pathlib import Path
        from illada_megatron.training.logs import StepLog
        log = StepLog(Path({str(path)!r}), 0, "save", False, print)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for step in range(1, 8):
            room = 1000 if step in (3, 4) else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            log.write({{"step": step, "text": "x" * (900 if step == 3 else 300)}})
        log.close()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4, 5, 6, 7]
    assert done.stdout.count("the run goes on") == 1
    assert "written again; the steps 3 are not in it" in done.stdout


def test_a_configuration_that_cannot_be_rewritten_is_a_warning(
    tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    save_dir = tmp_path / "save"
    (save_dir / "config.yaml" / "full").mkdir(parents=True)
    run = illada("train", *tiny_run, f"checkpoint.save_dir={save_dir}")
    assert run.code == 0, run.err
    assert f"warning: {save_dir}/config.yaml could not be written" in run.out
    assert (save_dir / "latest").read_text() == "step_00000003\n"


def test_going_back_within_a_run(tmp_path: Path) -> None:
    """After a rollback the steps come again; the log is the run's own, whatever checkpoint it began with."""
    path = tmp_path / "steps.jsonl"
    told: list[str] = []
    log = StepLog(path, 0, "save", False, told.append)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "again": False})
    log.go_back(2)
    log.write({"step": 3, "again": True})
    log.make_durable()
    log.close()
    assert [(one["step"], one["again"]) for one in read_steps(path)] == [(1, False), (2, False), (3, True)]
    assert told == []


def test_a_last_line_that_becomes_longer(tmp_path: Path) -> None:
    """What a step already has of a list stays, and no line is left behind in another."""
    path = tmp_path / "steps.jsonl"
    log = StepLog(path, 0, None, continues=False, tell=print)
    log.write({"step": 1, "held_out": [{"step": 0, "name": "a" * 100}], "loss": 1.0})
    log.amend({"held_out": [{"step": 1}]})
    log.close()
    (line,) = read_steps(path)
    assert line == {"step": 1, "held_out": [{"step": 0, "name": "a" * 100}, {"step": 1}], "loss": 1.0}


def test_each_validation_is_in_the_log(tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    path = tmp_path / "steps.jsonl"
    outcome = illada("train", *tiny_run, f"logging.jsonl_path={path}", "validation.interval_steps=1")
    assert outcome.code == 0, outcome.err
    assert [one["step"] for line in read_steps(path) for one in line.get("held_out", [])] == [1, 2, 3]


def test_a_last_line_that_has_no_room_to_grow_stays(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    code = f"""
        import resource
        from pathlib import Path
        from illada_megatron.training.logs import StepLog
        log = StepLog(Path({str(path)!r}), 0, "save", False, print)
        log.write({{"step": 1, "text": "x" * 300}})
        log.write({{"step": 2, "text": "x" * 300}})
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        log.amend({{"held_out": ["y" * 900]}})
        log.close()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert read_steps(path) == [{"step": step, "text": "x" * 300} for step in (1, 2)]
    assert done.stdout.count("the run goes on") == 1

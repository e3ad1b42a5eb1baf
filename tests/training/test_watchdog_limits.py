"""The watchdog that nobody has set: limits from the run's own times, for all it does from its start to its end."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from launch import launch, rank_processes, wait_for_step

from illada_megatron.config import load_config
from illada_megatron.training import watchdog
from illada_megatron.training.watchdog import EXIT_CODE, LEAST_SECONDS, UNMEASURED_SECONDS, Watchdog


def test_it_is_on() -> None:
    assert load_config(None).faults.watchdog_seconds == "auto"


def test_limits_from_the_runs_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the longest of the last hundred; what has not been measured, and what comes once, has an hour. A
    number says it of a step, and ten times as much of the rest."""
    now = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    patient = Watchdog("auto", rank=0, save_seconds=7200.0)
    assert (patient.limit("saving"), patient.limit("start")) == (14400.0 + LEAST_SECONDS, UNMEASURED_SECONDS)
    dog = Watchdog("auto", rank=0)

    def does(phase: str, seconds: float) -> None:
        nonlocal now
        dog.now(phase, 1)
        now += seconds

    try:
        assert dog.limit("step") == dog.limit("validation") == UNMEASURED_SECONDS
        does("start", 500.0)
        does("first step", 300.0)
        does("step", 40.0)
        dog.now("saving", 1)
        assert dog.limit("step") == 400.0
        does("saving", 400.0)
        for _ in range(99):
            does("step", 2.0)
        does("validation", 50.0)
        assert dog.limit("step") == 400.0
        does("step", 2.0)
        dog.now("saving", 1)
        assert dog.limit("step") == LEAST_SECONDS
        assert dog.limit("validation") == 500.0
        assert {dog.limit(one) for one in ("start", "first step", "saving", "rollback", "end")} == {UNMEASURED_SECONDS}
        assert Watchdog("auto", rank=0, save_seconds=6.0).limit("end") == 12.0 + LEAST_SECONDS
        by_hand = Watchdog(30, rank=0)
        assert (by_hand.limit("step"), by_hand.limit("saving"), by_hand.limit("start")) == (30, 300, UNMEASURED_SECONDS)
        by_hand = Watchdog(30, rank=0, save_seconds=3600.0)
        assert {by_hand.limit(one) for one in ("saving", "rollback", "end")} == {7200.0 + LEAST_SECONDS}
    finally:
        watchdog.faulthandler.cancel_dump_traceback_later()


def _train(arguments: list[str], before: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, which has changed the watchdog's constants."""
    code = f"""
        import sys
        from illada_megatron.training import watchdog
        {before}
        sys.argv = ["illada", "train", *sys.argv[1:]]
        from illada_megatron.__main__ import program
        program()
    """
    line = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def test_a_start_that_hangs_is_noticed(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """A checkpoint on a file system that does not answer: its record is a pipe that nobody writes to."""
    (tmp_path / "save" / "step_00000001").mkdir(parents=True)
    os.mkfifo(tmp_path / "save" / "step_00000001" / "checkpoint.json")
    run = _train([*tiny_run, f"checkpoint.save_dir={tmp_path / 'save'}"], "watchdog.UNMEASURED_SECONDS = 5.0")
    assert run.returncode == EXIT_CODE, run.stderr
    assert "step 0 (start) has not ended after" in run.stderr
    assert "in read_record" in run.stderr


@pytest.mark.parametrize("fails", ["pass", "raise OSError"], ids=["a good end", "an error"])
def test_an_end_that_hangs_is_noticed(fails: str) -> None:
    """What follows the loop has a limit of its own, however the loop ended."""
    code = f"""
        import contextlib, time
        from illada_megatron.training import watchdog
        watchdog.UNMEASURED_SECONDS = 2.0
        with watchdog.Watchdog("auto", rank=3) as dog:
            with contextlib.suppress(OSError), dog.last_phase("end"):
                dog.now("step", 7)
                {fails}
            time.sleep(600)
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_CODE, done.stderr
    assert "step 7 (end) has not ended" in done.stderr


def test_it_ends_the_rank_where_nobody_reads_its_report() -> None:
    """A full disk, or a pipe that is full and whose reader hangs as well."""
    code = """
        import os, sys, time
        from illada_megatron.training import watchdog
        watchdog.UNMEASURED_SECONDS = watchdog._LAST_WORD_SECONDS = 2.0
        if sys.argv[1] == "full disk":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        else:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            try:
                while os.write(writer, b"x" * 65536):
                    pass
            except BlockingIOError:
                os.set_blocking(writer, True)
            os.dup2(writer, 2)
        with watchdog.Watchdog("auto", rank=0) as dog:
            dog.now("step", 7)
            time.sleep(600)
    """
    for kind in ("full disk", "full pipe"):
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), kind], check=False)
        assert done.returncode == EXIT_CODE, kind


@pytest.mark.slow
def test_a_stopped_rank_is_noticed_by_default(small: tuple[str, ...], tmp_path: Path) -> None:
    """Two ranks with the configuration as it comes; what a run of small steps is given, five minutes, has to pass."""
    jsonl = tmp_path / "steps.jsonl"
    stopped_at = 0.0

    def stop_one_rank(launcher: psutil.Process) -> None:
        nonlocal stopped_at
        wait_for_step(jsonl, 4, launcher)
        waiting, stopped = rank_processes(launcher)
        stopped.suspend()
        stopped_at = time.monotonic()
        waiting.wait()
        stopped.resume()

    run = launch("train", [*small, "training.train_steps=100000"], 2, jsonl, stop_one_rank)
    assert run.process.returncode == EXIT_CODE, run.output
    assert time.monotonic() - stopped_at >= LEAST_SECONDS
    assert f"the limit is {LEAST_SECONDS:.0f} s (faults.watchdog_seconds auto)" in run.process.stderr

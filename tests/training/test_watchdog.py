"""A rank that hangs takes the run down with a report, instead of holding it until somebody looks."""

import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
from launch import launch, rank_processes, wait_for_step

from illada_megatron.training.watchdog import EXIT_CODE


def test_a_stopped_rank_is_reported_by_the_one_that_waits(small: tuple[str, ...], tmp_path: Path) -> None:
    """SIGSTOP: the rank is there and does nothing. The other says where it waits, for which collective, and exits."""
    jsonl = tmp_path / "steps.jsonl"
    arguments = [*small, "training.train_steps=100000", "faults.watchdog_seconds=3", f"run_dir={tmp_path / 'run'}"]

    def stop_one_rank(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, 4, launcher)
        waiting, stopped = rank_processes(launcher)
        stopped.suspend()
        waiting.wait(timeout=300)
        stopped.resume()  # else torch's launcher waits for half a minute before it kills it

    run = launch("train", arguments, 2, jsonl, stop_one_rank)
    assert run.process.returncode == EXIT_CODE, run.output
    report = run.process.stderr
    found = re.search(r"watchdog: rank 0 on \S+ \(pid \d+\): step (\d+) \(step\) has not ended after (\d+) s", report)
    assert found, run.output
    assert int(found[1]) == run.steps[-1]["step"] + 1
    assert 3 <= int(found[2]) < 60
    assert re.search(r'trainer.py", line \d+ in train_step', report)
    assert re.search(r"gloo:\w+ number \d+ of group \w+ \(\w+\), input .* not finished", report)
    assert "rank 0 failed first, with exit code 75" in report
    trace = (tmp_path / "run" / "traces" / f"rank_00000_step_{found[1]}.txt").read_text()
    assert found[0] in trace
    assert re.search(r'trainer.py", line \d+ in train_step', trace)
    recorded = json.loads((tmp_path / "run" / "traces" / f"rank_00000_step_{found[1]}.json").read_text())
    assert not recorded[-1]["retired"]
    assert {"profiling_name", "process_group", "collective_seq_id"} < recorded[-1].keys()


def test_a_run_that_goes_on_is_left_alone() -> None:
    """Twice the limit in all, never without a step for so long; nothing is left armed behind it."""
    code = """
        import time
        from illada_megatron.training.watchdog import Watchdog
        with Watchdog(1, rank=0) as watchdog:
            for step in range(5):
                watchdog.now("step", step)
                time.sleep(0.5)
            watchdog.now("validation", 5)
            time.sleep(2.0)
        time.sleep(1.5)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "watchdog" not in done.stderr


def test_a_rank_whose_interpreter_hangs_ends_too() -> None:
    """C code that keeps the GIL lets no Python thread run; faulthandler's own thread ends the rank, with the stacks."""
    code = """
        import ctypes
        from illada_megatron.training import watchdog
        watchdog._GRACE_SECONDS = 1.0
        with watchdog.Watchdog(1, rank=0) as dog:
            dog.now("step", 1)
            ctypes.PyDLL(None).sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=55
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert 'File "<string>", line 7' in done.stderr


def test_a_process_that_was_stopped_does_not_hang() -> None:
    """Ctrl-Z for twice the limit, and on: the time in which nothing of it ran does not count."""
    code = """
        import time
        from illada_megatron.training.watchdog import Watchdog
        with Watchdog(5, rank=0) as watchdog:
            watchdog.now("step", 1)
            print("begun", flush=True)
            time.sleep(3)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == "begun\n"
        psutil.Process(process.pid).suspend()
        time.sleep(10)
        psutil.Process(process.pid).resume()
        assert process.wait() == 0

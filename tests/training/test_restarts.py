"""`--max-restarts`: what is started again, what is not, and that nothing lives on beside it."""

import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch import TrainOnce, launch, rank_processes, wait_for_step

from illada_megatron.runtime import agent

TP2, SEQUENCE = "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"
_COMPUTED = ("step", "loss", "masked_cross_entropy", "cross_entropy_by_t", "grad_norm", "lr", "consumed_samples")


def _computed(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: step[name] for name in _COMPUTED} for step in steps]


def test_killed_ranks_start_again_by_themselves(small: tuple[str, ...], train_once: TrainOnce, tmp_path: Path) -> None:
    """Two kills, two restarts from the newest checkpoint under the layout that is chosen again each time: the losses
    are an undisturbed run's, bit for bit, each step once in the log, and no process is left."""
    jsonl, save_dir = tmp_path / "steps.jsonl", tmp_path / "checkpoints"
    layouts = "[{pipeline_model_parallel_size: 4}, {tensor_model_parallel_size: 2, sequence_parallel: true}, {}]"
    places = (f"parallel.layouts={layouts}", f"checkpoint.save_dir={save_dir}")
    started: list[psutil.Process] = []

    def kill_twice(launcher: psutil.Process) -> None:
        for step in (6, 13):
            wait_for_step(jsonl, step, launcher)
            started.extend(launcher.children(recursive=True))
            rank_processes(launcher)[step % 2].kill()

    run = launch(
        "train",
        [*small, "--max-restarts", "3", "checkpoint.interval_steps=4", *places],
        2,
        jsonl,
        kill_twice,
    )
    assert run.process.returncode == 0, run.output
    assert "failed with exit code -9: the ranks of this machine start again (restart 1 of 3)" in run.process.stderr
    assert "(restart 2 of 3)" in run.process.stderr
    assert "(restart 3 of 3)" not in run.process.stderr
    assert len(re.findall(r"continues from .*/step_000000\d\d: step (?:4|8|12)", run.process.stdout)) == 2
    said = re.sub(r"[\s│]+", " ", run.process.stdout)
    assert said.count("parallel.layouts[1] of 3, the first that fits not parallel.layouts[0]: world size 2 is not") == 3
    assert _computed(run.steps) == _computed(train_once(2, TP2, SEQUENCE).steps)
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_what_the_user_has_to_mend_is_not_tried_again(tiny_run: tuple[str, ...]) -> None:
    """A hundred starts of a thousand ranks would each fail in the same way. The launcher's exit code is the rank's."""
    run = launch("train", [*tiny_run, "--max-restarts", "100", "data.train_paths=[/nowhere/shard]"], nproc=2)
    assert run.process.returncode == agent.USER_ERROR, run.output
    assert "/nowhere/shard" in run.process.stderr
    assert "start again" not in run.output


@pytest.mark.slow
def test_restarts_are_used_up(small: tuple[str, ...], tmp_path: Path) -> None:
    jsonl = tmp_path / "steps.jsonl"

    def kill_each_attempt(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, 2, launcher)
        first = launcher.children()
        rank_processes(launcher)[0].kill()
        while not (again := [child for child in launcher.children() if child not in first]):
            assert launcher.status() != psutil.STATUS_ZOMBIE
            time.sleep(0.1)
        again[0].kill()

    run = launch("train", [*small, "--max-restarts", "1"], 2, jsonl, kill_each_attempt)
    assert run.process.returncode == 1, run.output
    assert run.process.stderr.count("start again") == 1
    assert "failed first, with exit code -9" in run.process.stderr
    assert "Traceback" not in run.process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_started_after_the_launcher_is_told_to_stop(
    number: signal.Signals, small: tuple[str, ...], tmp_path: Path
) -> None:
    """SIGTERM: the ranks save and leave, however many restarts are left. SIGKILL: no rank outlives its launcher."""
    jsonl, save_dir = tmp_path / "steps.jsonl", tmp_path / "checkpoints"
    started: list[psutil.Process] = []

    def tell(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, 3, launcher)
        started.extend(launcher.children(recursive=True))
        launcher.send_signal(number)

    run = launch("train", [*small, "--max-restarts", "3", f"checkpoint.save_dir={save_dir}"], 2, jsonl, tell)
    assert run.process.returncode == (0 if number == signal.SIGTERM else -number), run.output
    psutil.wait_procs(started, timeout=30)
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert "start again" not in run.output
    if number == signal.SIGTERM:
        assert (save_dir / "latest").read_text() == f"step_{run.steps[-1]['step']:08d}\n"

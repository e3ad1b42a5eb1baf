"""A run that stops and goes on equals one that never stopped: bit for bit in its layout, to rounding in another."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch import Illada, TrainOnce, launch, rank_processes, read_steps, run_warm, wait_for_step
from test_layouts import CP2, INTERLEAVED, PLAIN, PP2, RAMP_UP, RELATIVE, SEQUENCE, TP2, UNEVEN, assert_same_training

# What a run computes; the rest of a record is time.
_COMPUTED = (
    *("step", "loss", "masked_cross_entropy", "cross_entropy_by_t", "grad_norm", "lr"),
    *("consumed_samples", "consumed_tokens", "epochs"),
)


def _computed(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: step[name] for name in _COMPUTED} for step in steps]


@pytest.fixture(scope="module")
def half(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """half(nproc, *overrides) -> save_dir of a run that stopped at step 10 of 20; made once."""
    made: dict[tuple[int, tuple[str, ...]], Path] = {}

    def train_half(nproc: int, *overrides: str) -> Path:
        if (nproc, overrides) not in made:
            save_dir = tmp_path_factory.mktemp("half") / "checkpoints"
            run = run_warm(
                "train", [*small, *overrides, "training.exit_steps=10", f"checkpoint.save_dir={save_dir}"], nproc
            )
            assert run.process.returncode == 0, run.output
            assert (save_dir / "latest").read_text() == "step_00000010\n"
            made[nproc, overrides] = save_dir
        return made[nproc, overrides]

    return train_half


@pytest.fixture
def resume(small: tuple[str, ...], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """resume(save_dir, nproc, *overrides) -> steps 11 to 20, in a run of its own that starts from there."""

    def go_on(load_dir: Path, nproc: int, *overrides: str) -> list[dict[str, Any]]:
        run = run_warm(
            "train", [*small, *overrides, f"checkpoint.load_dir={load_dir}"], nproc, jsonl=tmp_path / "resumed.jsonl"
        )
        assert run.process.returncode == 0, run.output
        assert f"continues from {load_dir}/step_00000010: step 10" in run.process.stdout.replace("\n", "")
        assert len(run.steps) == 10
        return run.steps

    return go_on


@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [(1, ()), (2, (PP2, INTERLEAVED, PLAIN)), pytest.param(8, (TP2, PP2), marks=pytest.mark.slow)],
    ids=["DP1", "PP2, interleaved, plain optimizer", "TP2 PP2 DP2"],
)
def test_same_layout_bit_for_bit(
    nproc: int, overrides: tuple[str, ...], half: Callable, resume: Callable, train_once: TrainOnce
) -> None:
    """A counter, a moment or a bit of the weights not restored, noise or order replayed from the start: all show."""
    resumed = resume(half(nproc, *overrides), nproc, *overrides)
    assert _computed(resumed) == _computed(train_once(nproc, *overrides).steps[10:])


@pytest.mark.parametrize(
    ("saved_under", "resumed_under"),
    [
        pytest.param((1, ()), (2, ()), marks=pytest.mark.slow),
        ((1, ()), (2, (TP2, SEQUENCE))),
        ((2, (PP2, INTERLEAVED, PLAIN)), (2, (TP2, PLAIN))),
        ((2, (CP2,)), (2, (PP2, UNEVEN))),
        pytest.param((2, (PP2, UNEVEN)), (4, (CP2, TP2)), marks=pytest.mark.slow),
        pytest.param((8, (TP2, PP2)), (1, ()), marks=pytest.mark.slow),
        pytest.param((8, (TP2, PP2)), (2, (PP2, INTERLEAVED)), marks=pytest.mark.slow),
        pytest.param((1, ()), (8, (TP2, PP2)), marks=pytest.mark.slow),
        pytest.param((2, ()), (1, ()), marks=pytest.mark.slow),
    ],
    ids=[
        "DP1 -> DP2",
        "DP1 -> TP2 SP",
        "PP2 interleaved -> TP2, plain optimizer",
        "CP2 -> PP2 uneven",
        "PP2 uneven -> CP2 TP2",
        "TP2 PP2 DP2 -> DP1",
        "TP2 PP2 DP2 -> PP2 interleaved",
        "DP1 -> TP2 PP2 DP2",
        "DP2 -> DP1",
    ],
)
def test_other_layout(
    saved_under: tuple[int, tuple[str, ...]],
    resumed_under: tuple[int, tuple[str, ...]],
    half: Callable,
    resume: Callable,
    train_once: TrainOnce,
) -> None:
    """Weights or optimizer moments that land in another parameter or slice than they left."""
    resumed = resume(half(saved_under[0], *saved_under[1]), resumed_under[0], *resumed_under[1])
    assert_same_training(resumed, train_once(1).steps[10:], RELATIVE)


def test_batch_ramp_up_goes_on(half: Callable, resume: Callable, train_once: TrainOnce) -> None:
    """At step 10 of the ramp-up the samples consumed are not steps times batch: the sample index has to be saved."""
    resumed = resume(half(1, RAMP_UP), 1, RAMP_UP)
    assert resumed[0]["consumed_samples"] == 3 * 4 + 2 * 6 + 6 * 8
    assert _computed(resumed) == _computed(train_once(1, RAMP_UP).steps[10:])


def test_stopped_by_signals(small: tuple[str, ...], train_once: TrainOnce, tmp_path: Path) -> None:
    """SIGTERM to the launcher (Slurm), SIGTERM to one rank, Ctrl-C: each time the run saves, leaves with 0, and the
    next start goes on as if nothing had happened."""
    jsonl, save_dir = tmp_path / "steps.jsonl", tmp_path / "checkpoints"
    longer = "training.train_steps=60"  # a signal takes its time: each run has to be interrupted before the end
    arguments = [*small, longer, f"checkpoint.save_dir={save_dir}"]
    before = 0

    def terminate_launcher(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, before + 3, launcher)
        launcher.terminate()

    def terminate_one_rank(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, before + 3, launcher)
        rank_processes(launcher)[1].terminate()

    def press_ctrl_c(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, before + 3, launcher)
        for process in (*rank_processes(launcher), launcher):
            process.send_signal(signal.SIGINT)

    for interrupt in (terminate_launcher, terminate_one_rank, press_ctrl_c):
        run = launch("train", arguments, 2, jsonl, interrupt)
        assert run.process.returncode == 0, (interrupt.__name__, run.output)
        stopped_at = run.steps[-1]["step"]
        assert before < stopped_at < 60, interrupt.__name__
        assert (save_dir / "latest").read_text() == f"step_{stopped_at:08d}\n"
        assert f"after step {stopped_at}" in run.process.stdout
        assert "Traceback" not in run.output
        before = stopped_at
    run = run_warm("train", arguments, 2, jsonl)
    assert run.process.returncode == 0, run.output
    assert _computed(run.steps) == _computed(train_once(2, longer).steps)


def test_killed_in_the_middle_of_a_step(small: tuple[str, ...], train_once: TrainOnce, tmp_path: Path) -> None:
    """kill -9 of a rank: the run fails instead of hanging, and the next start repeats what came after the last
    checkpoint, bit for bit."""
    jsonl, save_dir = tmp_path / "steps.jsonl", tmp_path / "checkpoints"
    arguments = [*small, f"checkpoint.save_dir={save_dir}", "checkpoint.interval_steps=4"]

    def kill_one_rank(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, 6, launcher)
        rank_processes(launcher)[1].kill()

    killed = launch("train", arguments, 2, jsonl, kill_one_rank)
    assert killed.process.returncode not in (0, None)
    assert killed.steps[-1]["step"] < 20
    resumed = run_warm("train", arguments, 2, jsonl)
    assert resumed.process.returncode == 0, resumed.output
    continued = re.search(r"continues from .*: step (\d+),", resumed.output)
    assert continued, resumed.output
    assert int(continued[1]) in (4, 8, 12, 16)
    assert int(continued[1]) <= killed.steps[-1]["step"]  # the steps in between were computed twice
    reference = train_once(2).steps
    assert _computed(killed.steps) == _computed(reference[: len(killed.steps)])
    assert _computed(resumed.steps) == _computed(reference)  # each step stands once in the log


def test_decay_begins_where_the_run_goes_on(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """decay_start=now given when going on from step 2: the rate falls from step 3, also through another restart."""
    rates: dict[str, list[float]] = {}
    for name, stops in (("straight", (6,)), ("stopped again", (4, 6))):
        jsonl = tmp_path / f"{name}.jsonl"
        arguments = [*tiny_run, f"checkpoint.save_dir={tmp_path / name}", f"logging.jsonl_path={jsonl}"]
        arguments += ["training.lr=1e-3", "schedule.warmup_steps=0", "training.train_steps=6", "schedule.min_lr=1e-4"]
        for stop, start in ((2, "never"), *((stop, "now") for stop in stops)):
            outcome = illada("train", *arguments, f"training.exit_steps={stop}", f"schedule.decay_start={start}")
            assert outcome.code == 0, outcome.err
        rates[name] = [step["lr"] for step in read_steps(jsonl)]
    straight = rates["straight"]
    assert straight[:2] == [1e-3, 1e-3]
    assert straight[1:] == sorted(set(straight[1:]), reverse=True)
    assert straight[5] == pytest.approx(1e-4)
    assert rates["stopped again"] == straight

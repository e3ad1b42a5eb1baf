"""`make gpu` as far as a CPU goes: its dry mode end to end, and what it makes of figures that a GPU would bring."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu.layer_shape import layers_that_fit, workload_of
from benchmarks.gpu.limited import run_limited
from benchmarks.gpu.step_runs import RunFailedError, head_saving, measure_run, runs_on, step_bars, step_results
from benchmarks.measuring.processes import Timing
from benchmarks.step.step_figures import Figures, Work
from benchmarks.step.step_variants import OURS, SAME_LAYERS, Variant
from benchmarks.step.workloads import TINY_WORKLOADS
from illada_megatron.config import load_config

ROOT = Path(__file__).parents[3]
LARGEST, SHARED = "as many layers as fit", "with all logits"
GIB = 2**30


@pytest.mark.slow
def test_dry_run() -> None:
    """All that needs no GPU: the tests of one file, three runs, the loss, the tables, the last line."""
    arguments = ["--dry", "--steps", "1", "--minutes", "60", "--test", "tests/ops/test_operators_on_device.py"]
    arguments += ["--test", "tests/ops/test_compute_sanitizer.py"]
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["tests"]["failed"] == []
    assert report["tests"]["passed"] >= 4
    assert report["tests"]["skipped"]["needs a CUDA device"] == 1
    assert {(one["workload"], one["precision"], one["who"]) for one in report["steps"]} == {
        (LARGEST, "bf16", OURS),
        (SHARED, "bf16", OURS),
        (SHARED, "bf16", SAME_LAYERS),
    }
    assert report["left_out"] == {f"{LARGEST} fp8 {OURS}": "needs a GPU"}
    assert report["bars"]["losses of both: smallest agreement"]["holds"]
    assert report["bars"]["bf16: MFU"]["value"] is None  # of a CPU no peak is known
    assert report["loss"]["missing"]["liger-kernel"] == "liger-kernel needs a GPU"
    assert any("fused / bare GEMMs" in name for name in report["bars"])


def test_without_a_gpu_it_says_so() -> None:
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "benchmarks.gpu"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert "torch finds no GPU; --dry tries the script on a CPU" in run.stderr


def test_what_there_is_no_time_for_is_named() -> None:
    line = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--no-tests", "--minutes", "0"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert "tests" not in report
    assert report["steps"] == []
    assert report["left_out"]["masked loss"] == "0.0 minutes were left, expected 1"
    assert not report["holds"]


def test_layers_of_an_h100_and_an_h200() -> None:
    """By the planner's memory, which tests/planning checks; more with more memory, fewer beside all logits."""
    small, large = layers_that_fit(80 * GIB), layers_that_fit(139 * GIB)
    assert (small.ours, large.ours) == (12, 23)  # docs/h100.md
    assert 0 < small.peer < small.ours
    assert small.peer < large.peer < large.ours
    assert small.of_local_layers().ours == small.ours // 2
    with pytest.raises(ValueError, match=r"a GPU of 16 GiB holds no layer"):
        layers_that_fit(16 * GIB)


def test_the_layers_are_those_of_the_8b_model() -> None:
    workload = workload_of(7)
    ours = load_config("tiny", workload.overrides()).model
    preset = load_config("illada-8b").model
    for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size"):
        assert getattr(ours, name) == getattr(preset, name)
    assert ours.num_layers == 7
    assert workload.sequence_length == 8192


def _figures(workload: str, precision: str, who: str, seconds: float, loss: float = 6.0) -> Figures:
    work = Work(1000, 500, 0, 1, 4e12, {"head and loss": 1e12})
    return Figures(Variant(workload, precision, who), work, {}, [Timing(seconds, seconds, loss)])


def test_bars_of_figures() -> None:
    """500 of 1,000 tokens masked, the head a quarter of the work: all tokens at the head are 1.25 times as much."""
    all_ = [
        _figures(LARGEST, "bf16", OURS, 0.008),
        _figures(LARGEST, "fp8", OURS, 0.005),
        _figures(SHARED, "bf16", OURS, 0.008),
        _figures(SHARED, "bf16", SAME_LAYERS, 0.009, loss=6.3),
    ]
    assert head_saving(all_[0]) == 1.25
    figures = {one.variant: one for one in all_}
    results = step_results(figures, dict.fromkeys(figures, 5), 1000.0)
    assert [one["mfu"] for one in results] == [0.5, 0.4, 0.5, pytest.approx(4 / 9)]
    found = {name: (round(bar["value"], 3), bar["holds"]) for name, bar in step_bars(results, figures).items()}
    assert found == {
        "bf16: MFU": (0.5, True),
        "FP8 / bf16: tokens/s": (1.6, True),
        "ours / megatron-core's model: tokens/s": (1.125, False),
        "losses of both: smallest agreement": (0.952, False),
    }


def test_a_run_that_ends_with_an_error_is_no_end_of_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFailedError, match="its process ended with an error"):
        measure_run(Variant("W1", "fp8", OURS), TINY_WORKLOADS["W1"], 1, 600.0)  # a CPU has no FP8
    assert "set training.precision=bf16" in capfd.readouterr().err


def test_runs_on_a_gpu() -> None:
    fitting = layers_that_fit(80 * GIB)
    assert [(variant.precision, work.num_layers) for variant, work in runs_on(fitting)] == [
        ("bf16", fitting.ours),
        ("fp8", fitting.ours),
        ("bf16", fitting.peer),
        ("bf16", fitting.peer),
    ]


def test_what_takes_too_long_is_cut_off_with_what_it_has_started(tmp_path: Path) -> None:
    """It would be on the GPU while others are measured. What is interrupted may still write what it has found."""
    code = """
import pathlib, subprocess, sys, time
deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
pathlib.Path("pid").write_text(str(child.pid))
print("begun", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("interrupted")
"""
    found = run_limited([sys.executable, "-c", code], tmp_path, 5.0, stdout=subprocess.PIPE)
    assert found == (None, "begun\ninterrupted\n")
    child = int((tmp_path / "pid").read_text())
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
    assert run_limited([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, 60.0) == (3, "")

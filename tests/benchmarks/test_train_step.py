"""The step benchmark end to end on a miniature: what later comparisons read from its last line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = {"attention", "MLP", "head and loss", "embedding", "optimizer", "other"}


def test_last_line_has_the_figures_and_parts_sum_to_the_step() -> None:
    run = subprocess.run(
        [sys.executable, "benchmarks/train_step.py", "--tiny", "-w", "W1", "-p", "bf16", "--rounds", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])

    assert report["machine"].keys() >= {"cpu", "cores", "threads", "torch", "megatron_core", "python", "device"}
    (result,) = report["results"]
    assert (result["workload"], result["precision"]) == ("W1", "bf16")
    assert len(result["step_seconds"]) == len(result["step_cpu_seconds"]) == 2
    assert 0 < result["masked_tokens_per_step"] < result["tokens_per_step"] == 8 * 128
    for name in ("tokens_per_second", "cpu_seconds_per_token", "achieved_tflops", "peak_memory_bytes"):
        assert 0 < result[name] < math.inf, name
    parts, step = result["parts"], result["breakdown_step"]
    assert parts.keys() == PARTS
    assert all(part["seconds"] > 0 for part in parts.values())
    # CPU time: on a busy machine a process may wait between the clock's last reading and the step's
    assert sum(part["cpu_seconds"] for part in parts.values()) == pytest.approx(step["cpu_seconds"], rel=0.03)
    assert sum(part["flops"] for part in parts.values()) == pytest.approx(result["flops_per_step"])


def test_help_shows_an_example() -> None:
    run = subprocess.run(
        [sys.executable, "benchmarks/train_step.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "python benchmarks/train_step.py --workload W1" in run.stdout

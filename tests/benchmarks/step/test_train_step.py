"""The step benchmark end to end on a miniature: what later comparisons read from its last line, and that all variants
do the same work."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measuring.processes import Timing
from benchmarks.step.step_bars import check_losses, step_bars
from benchmarks.step.step_figures import Figures, Work
from benchmarks.step.step_variants import BARE, MEGATRON, OURS, Variant

ROOT = Path(__file__).parents[3]
PARTS = {"attention", "MLP", "head and loss", "embedding", "optimizer", "other"}


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.step.train_step", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    run = _run("--tiny", "-w", "W1", "--rounds", "2")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_a_step_of_ours_and_its_parts() -> None:
    run = _run("--tiny", "-w", "W1", "-p", "fp32", "--rounds", "1", "--warmup", "0", "--who", "ours")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["holds"] is False  # the bars are of bf16
    (result,) = report["results"]
    assert result["parts"].keys() == PARTS
    assert all(part["seconds"] > 0 for part in result["parts"].values())


@pytest.fixture(scope="module")
def results(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["precision"], one["who"]): one for one in report["results"]}


@pytest.mark.slow
def test_last_line_has_the_figures_of_every_variant(report: dict[str, Any], results: dict) -> None:
    expected = {"cpu", "cores", "threads", "torch", "megatron_core", "python", "device", "fp32_gemm_relative_error"}
    assert report["machine"].keys() >= expected
    assert results.keys() == {(kind, who) for kind in ("bf16", "fp32") for who in (OURS, MEGATRON, BARE)}
    for result in results.values():
        assert len(result["step_seconds"]) == len(result["step_cpu_seconds"]) == 2
        assert 0 < result["masked_tokens_per_step"] < result["tokens_per_step"] == 8 * 128
        for name in ("tokens_per_second", "cpu_seconds_per_token", "achieved_tflops", "peak_memory_bytes"):
            assert 0 < result[name] < math.inf, name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_parts_of_our_step_sum_to_the_step(results: dict, precision: str) -> None:
    result = results[precision, OURS]
    parts, step = result["parts"], result["breakdown_step"]
    assert parts.keys() == PARTS
    assert all(part["seconds"] > 0 for part in parts.values())
    # CPU time: on a busy machine a process may wait between the clock's last reading and the step's
    assert sum(part["cpu_seconds"] for part in parts.values()) == pytest.approx(step["cpu_seconds"], rel=0.03)
    assert sum(part["flops"] for part in parts.values()) == pytest.approx(result["flops_per_step"])


@pytest.mark.slow
def test_the_peer_computes_our_losses_step_by_step(results: dict) -> None:
    """From the same weights, over the same masked tokens, with the same gradients and optimizer."""
    ours = results["fp32", OURS]["losses"]
    assert results["fp32", MEGATRON]["losses"] == pytest.approx(ours, rel=1e-4)
    assert results["bf16", MEGATRON]["losses"] == pytest.approx(results["bf16", OURS]["losses"], rel=1e-2)
    assert ours[1] < ours[0]  # it trains, on the same samples every time


@pytest.mark.slow
def test_bars_are_there_with_their_figures(report: dict[str, Any]) -> None:
    assert report["bars"].keys() == {
        f"W1 bf16 ours / {MEGATRON}: tokens/s",
        f"W1 bf16 ours / {BARE}: tokens/s",
    }
    assert report["holds"] == all(bar["holds"] for bar in report["bars"].values())
    for bar in report["bars"].values():
        assert bar.keys() == {"value", "at_least", "cpu_seconds_ratio", "holds"}
        assert bar["holds"] == (bar["value"] >= bar["at_least"])


def test_bars_take_the_fastest_peer_and_the_median_of_the_rounds_ratios() -> None:
    figures = [
        _figures("W2", OURS, [1.0, 1.0, 4.0], peak=10),
        _figures("W2", MEGATRON, [9.0, 9.0, 9.0], peak=10),
        _figures("W2", f"{MEGATRON}, compiled loss", [2.0, 1.5, 8.0], peak=30),
        _figures("W2", BARE, [0.5, 0.7, 3.0], peak=1),
    ]
    bars = step_bars(figures)
    assert {name: (bar["value"], bar["holds"]) for name, bar in bars.items()} == {
        f"W2 bf16 ours / {MEGATRON}, compiled loss: tokens/s": (2.0, True),
        f"W2 bf16 {MEGATRON}, compiled loss / ours: peak memory": (3.0, True),
        f"W2 bf16 ours / {BARE}: tokens/s": (0.7, False),
    }


def test_a_variant_that_finds_another_loss_is_named() -> None:
    ours, peer = _figures("W1", OURS, [1.0], loss=7.0), _figures("W1", MEGATRON, [1.0], loss=7.2)
    assert check_losses([ours, _figures("W1", BARE, [1.0]), _figures("W2", OURS, [1.0], loss=9.0)], "highest") is None
    difference = check_losses([ours, peer], "highest")
    assert difference is not None
    assert "W1 bf16 megatron-core" in difference
    assert "7.2" in difference


def test_help_shows_an_example() -> None:
    run = _run("--help")
    assert run.returncode == 0, run.stderr
    assert "python -m benchmarks.step.train_step --workload W1" in run.stdout


def _figures(workload: str, who: str, seconds: list[float], peak: int = 0, loss: float | None = None) -> Figures:
    work = Work(1, 1, 1, 1, 1.0, {})
    timings = [Timing(one, one, loss) for one in seconds]
    return Figures(Variant(workload, "bf16", who), work, {}, timings, peak_memory_bytes=peak)

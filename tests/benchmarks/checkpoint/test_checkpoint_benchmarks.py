"""The benchmarks of checkpoints in miniature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Benchmark = Callable[..., dict[str, Any]]


@pytest.mark.slow
def test_resharding_against_cp(benchmark: Benchmark, tmp_path: Path) -> None:
    """0.18 GB is the smallest: three layouts, each the start of a command with processes of its own."""
    sizes = ("--gigabytes", 0.01, "--rounds", 1, "--processes", 1)
    report = benchmark("checkpoint.reshard", "--directory", tmp_path, *sizes)
    assert len(report["runs"]) == 4
    assert all(run["seconds"] > 0 for runs in report["runs"].values() for run in runs)
    assert not list(tmp_path.iterdir())


def test_saves_of_ours_and_megatrons(benchmark: Benchmark, tmp_path: Path) -> None:
    report = benchmark("checkpoint.save_stall", "--directory", tmp_path, "--tiny", "--layers", 1, "--rounds", 1)
    assert report["variants"].keys() == {
        *("ours", "ours, while the run goes on"),
        *("megatron-core", "megatron-core, asynchronous"),
    }
    assert all(found["seconds"] > 0 for found in report["variants"].values())
    assert not list(tmp_path.iterdir())

"""The benchmarks of generation, in miniature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter
from tests.checkpoint.random_weights import random_checkpoint, small_config

Benchmark = Callable[..., dict[str, Any]]


@pytest.mark.slow
def test_everyone_generates_the_same(benchmark: Benchmark) -> None:
    report = benchmark("generation.speed", "--tiny", "--threads", 1)
    assert {one["who"]: one["texts"] for one in report["results"]}["ours, all prompts"] == 4
    assert len(report["results"]) == 7
    assert all(len(one["block_seconds"]) == 2 and one["peak_memory_bytes"] > 0 for one in report["results"])
    equal = report["equal_tokens"]
    assert equal["ours, one prompt"] == equal["ours, all prompts"] == 1.0
    assert report["holds"] == all(bar["holds"] for bar in report["bars"].values())


def test_every_cache_and_every_rule(benchmark: Benchmark, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "run", small_config())
    with IndexedDatasetWriter(tmp_path / "held_out", 250) as writer:
        writer.add(np.random.default_rng(0).integers(6, 250, 300).astype(np.int32), [300])
    lengths = ("--prompt-length", 12, "--gen-length", 12, "--block-length", 4)
    places = ("--checkpoint", tmp_path / "run", "--held-out", tmp_path / "held_out", "--plot", tmp_path / "plot.svg")
    report = benchmark("generation.caches", *places, *lengths, "--texts", 3, "--samples", 6)
    found = {(one["cache"], one["reveal"]): one for one in report["results"]}
    assert len(found) == 20
    full = found["none", "steps"]
    assert full["steps"] == 3 * 12
    assert full["position_passes"] == 3 * 4 * (16 + 20 + 24)
    assert (full["equal_tokens"], full["bound_change"]) == (1, 0)
    # a first pass of each block over everything, then the block, with nothing behind it
    dual = found["dual", "steps"]
    assert dual["position_passes"] == 3 * (16 + 20 + 24 + 3 * 3 * 4) == found["prefix", "steps"]["position_passes"]
    assert (tmp_path / "plot.svg").stat().st_size > 0

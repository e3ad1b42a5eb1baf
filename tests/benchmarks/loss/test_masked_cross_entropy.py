"""The loss benchmark: its last line on a miniature, and that its variants compute one loss and one gradient."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.loss.loss_bars import LossFigures, loss_bars
from benchmarks.loss.loss_cases import (
    FUSED,
    GATHERED_HIDDEN,
    GEMMS,
    MAIN_GRAD,
    PEERS,
    REFERENCE,
    TINY_SHAPE,
    VARIANTS,
    LossCase,
    Repetition,
)
from benchmarks.loss.loss_variants import MissingError, make_loss
from benchmarks.measuring.process_memory import PeakMemory
from benchmarks.measuring.processes import Timing
from illada_megatron.runtime import Runtime

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    line = [sys.executable, "-m", "benchmarks.loss.masked_cross_entropy", "--tiny", "--dtype", "bf16", "--rounds", "2"]
    run = subprocess.run([*line, "--masked-share", "0.5"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_last_line_has_every_variant(report: dict[str, Any]) -> None:
    results = {one["variant"]: one for one in report["results"]}
    assert results.keys() | report["missing"].keys() == set(VARIANTS)
    assert {
        GEMMS,
        GATHERED_HIDDEN,
        "chunked torch",
        "megatron-core fused, gathered hidden",
        REFERENCE,
    } <= results.keys()
    for result in results.values():
        assert len(result["all_seconds"]) == len(result["all_cpu_seconds"]) == 2
        assert 0 < result["seconds"] < math.inf
        assert (result["loss"] is None) == (result["extra_bytes"] is None) == (result["variant"] == GEMMS)


@pytest.mark.slow
def test_losses_agree(report: dict[str, Any]) -> None:
    losses = [one["loss"] for one in report["results"] if one["loss"] is not None]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)


@pytest.mark.slow
def test_bars_are_there_and_do_not_hold_unmeasured(report: dict[str, Any]) -> None:
    assert report["bars"].keys() == {
        f"cpu bf16 fused / {GEMMS}: time",
        "cpu bf16 fastest peer / fused: time",
        f"cpu bf16 fused / {GATHERED_HIDDEN}: extra memory",
    }
    assert report["holds"] == all(bar["holds"] for bar in report["bars"].values())
    for bar in report["bars"].values():
        assert (bar["value"] is None) == (MAIN_GRAD in report["missing"])
        assert not (bar["holds"] and bar["value"] is None)


def test_bars_compare_with_the_products_the_fastest_peer_and_gathered_hidden() -> None:
    figures = [
        _figures(GEMMS, [2.0, 2.0, 1.0]),
        _figures(GATHERED_HIDDEN, [4.0, 4.0, 4.0], extra_bytes=800),
        _figures("chunked torch", [3.0, 2.6, 3.0], extra_bytes=100),
        _figures(MAIN_GRAD, [2.2, 2.0, 2.0], extra_bytes=101),
        _figures(FUSED, [1.0, 1.0, 1.0], extra_bytes=0),
        _figures(GEMMS, [9.0, 9.0, 9.0], share=0.85),
    ]
    time, speed, memory = loss_bars("cpu", "bf16", figures).values()
    assert (time["value"], time["own_gradient"][0], time["holds"]) == (1.1, 0.5, True)
    assert (speed["value"], speed["peer"], speed["holds"]) == (pytest.approx(3.0 / 2.2), "chunked torch", True)
    assert (memory["value"], memory["bytes"], memory["holds"]) == (101 / 800, [101, 800], False)


@pytest.mark.parametrize("variant", [*PEERS, REFERENCE, FUSED, MAIN_GRAD])
def test_each_variant_has_the_exact_loss_and_gradients(variant: str, single_process: Runtime) -> None:
    if variant.startswith("megatron-core fused"):
        pytest.skip("goes through torch.compile; its loss is compared in the script")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(600, 16, generator=generator), torch.randn(96, 16, generator=generator)
    labels = torch.randint(96, (600,), generator=generator)
    loss_weight = torch.where(torch.rand(600, generator=generator) < 0.9, 2.0, 0.0)  # more than two chunks of rows
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = (loss_weight * F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none")).sum()
    expected.backward()

    trained = [x.clone().requires_grad_() for x in (hidden, weight)]
    try:
        loss = make_loss(variant, trained[1])(*trained, labels, loss_weight)
    except MissingError as error:
        pytest.skip(str(error))
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(trained[0].grad.double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    if variant != MAIN_GRAD:
        torch.testing.assert_close(trained[1].grad.double(), exact[1].grad, rtol=1e-4, atol=1e-3)


def test_extra_memory_is_what_was_held_at_most_since() -> None:
    memory = PeakMemory(on_cuda=False)
    block = torch.zeros(1 << 24)
    del block
    assert memory.extra_bytes() == pytest.approx(64 << 20, rel=0.1)
    assert PeakMemory(on_cuda=False).extra_bytes() < 8 << 20


def _figures(variant: str, seconds: list[float], share: float = 0.5, extra_bytes: int | None = None) -> LossFigures:
    case = LossCase(variant, "cpu", "bf16", TINY_SHAPE, None, "highest")
    repetitions = [Repetition(Timing(one, one, 1.0), extra_bytes) for one in seconds]
    return LossFigures(case, share, 1.0, repetitions)

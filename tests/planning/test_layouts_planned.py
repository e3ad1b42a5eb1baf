"""Speed against published runs that it was not fitted to; the search; what `illada plan --config` shows."""

import json
from pathlib import Path
from typing import get_args

import pytest
from launch import Illada

from benchmarks.planning.published import MODELS, ROWS, Row, fitted_share, predicted, row_workload
from illada_megatron.cli.run_commands import ConfigOption
from illada_megatron.config import load_config, preset_names
from illada_megatron.config.layout import resolve_layout
from illada_megatron.planning import (
    MEMORY_SHARE,
    device_names,
    explained,
    load_device,
    planned,
    search,
    step_time,
    workload,
)
from illada_megatron.planning.report import overrides
from illada_megatron.planning.search import candidates
from illada_megatron.runtime.device import bf16_peak_tflops
from illada_megatron.training.flops import training_flops

H100 = load_device("h100")


@pytest.mark.parametrize("row", [row for row in ROWS if not row.fitted], ids=lambda row: f"{row.model} {row.device}")
def test_published_speeds(row: Row) -> None:
    assert predicted(row, load_device(row.device)) == pytest.approx(row.tokens_per_second, rel=0.15)


@pytest.mark.parametrize("row", [row for row in ROWS if row.fitted], ids=lambda row: f"{row.model} {row.device}")
def test_the_only_fit(row: Row) -> None:
    device = load_device(row.device)
    assert fitted_share(row) == pytest.approx(device.kernel_share.value, rel=0.005)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model} {row.device}")
def test_published_flops_are_counted_alike(row: Row) -> None:
    """Their TFLOP/s are their tokens/s times our FLOPs of a token of a causal model."""
    flops = row_workload(row).flops_per_token * row.tokens_per_second
    assert flops == pytest.approx(row.tflops * 1e12, rel=0.01)
    assert MODELS[row.model].num_parameters > 0


@pytest.mark.parametrize("preset", ["illada-8b", "illada-70b", "llada-8b"])
def test_flops_of_a_token_are_those_of_a_step(preset: str) -> None:
    """training/flops.py of a million tokens with the mean lengths and masks."""
    work, tokens = workload(load_config(preset)), 1_000_000
    squares, masked = round(tokens * work.attended), round(tokens * work.masked_share)
    assert work.flops_per_token * tokens == pytest.approx(training_flops(work.model, tokens, squares, masked), rel=1e-6)


@pytest.mark.parametrize("name", device_names())
def test_peaks_are_those_that_mfu_is_reported_with(name: str) -> None:
    device = load_device(name)
    peak = bf16_peak_tflops(device.name)
    assert peak is not None
    assert device.bf16_peak_flops.value == peak * 1e12
    assert device.fp8_peak_flops.value == pytest.approx(2 * peak * 1e12, rel=1e-3)  # runtime/device.py


@pytest.mark.parametrize(
    ("preset", "gpus", "device"), [("illada-8b", 8, "h100"), ("illada-8b", 8, "b200"), ("illada-70b", 64, "h200")]
)
def test_search(preset: str, gpus: int, device: str) -> None:
    config, chip = load_config(preset), load_device(device)
    work = workload(config)
    found = search(work, gpus, chip, ["bf16", "fp8"])
    assert [one.tokens_per_second for one in found] == sorted((one.tokens_per_second for one in found), reverse=True)
    assert len({one.candidate for one in found}) == len(found) > 0
    limit = MEMORY_SHARE * chip.memory_bytes.value
    for one in found:
        assert one.memory.total <= limit
        assert one.step.seconds == pytest.approx(sum(part.value for part in one.step.parts.values()))
        assert 0 <= one.step.bubble < 1
        assert 0 <= one.step.hidden <= 1
        assert 0 < one.mfu < 1
    # what fits without recomputation is not listed with it
    layouts = {one.candidate._replace(recompute="none") for one in found}
    assert len(layouts) == len(found)


def test_every_layout_is_one_that_the_configuration_takes() -> None:
    work = workload(load_config("illada-8b"))
    for one in [*candidates(work, 64, H100, ["bf16", "fp8"])][::97]:
        layout = resolve_layout(load_config("illada-8b", overrides(work, one)), 64, padded=False)
        assert (layout.tensor, layout.pipeline, layout.virtual, layout.context, layout.data) == (
            *(one.tensor, one.pipeline, one.virtual, one.context, one.data),
        )
        assert layout.num_microbatches == one.microbatches(work.global_batch_size)


def test_recomputation_trades_speed_for_memory() -> None:
    work = workload(load_config("illada-8b"))
    first = next(candidates(work, 8, H100, ["bf16"]))
    none, selective, full = (
        planned(work, first._replace(recompute=one), H100) for one in ("none", "selective", "full")
    )
    assert none.memory.total > selective.memory.total > full.memory.total
    assert none.step.seconds < selective.step.seconds < full.step.seconds
    # a third of forward and backward, but for the head, communication and what is no product
    assert full.step.seconds / none.step.seconds == pytest.approx(4 / 3, rel=0.1)


def test_more_of_a_pipeline_is_more_of_a_bubble() -> None:
    """(PP - 1) / (VP M) of a micro-batch's time on a stage (arXiv 2104.04473), where stages are alike."""
    work = workload(load_config("illada-70b"))
    found = {
        (one.pipeline, one.virtual): step_time(work, one, H100)
        for one in candidates(work, 256, H100, ["bf16"])
        if (one.tensor, one.context, one.micro_batch_size, one.pipeline_layout) == (8, 1, 1, "even")
    }
    assert found[8, 1].bubble > found[8, 2].bubble > found[8, 5].bubble > found[4, 5].bubble > 0


def test_arithmetic_is_the_tables() -> None:
    work = workload(load_config("illada-70b"))
    best = search(work, 64, H100, ["fp8"])[0]
    lines = dict(explained(work, best, H100))
    assert f"{best.memory.total / 2**30:.2f} GiB" in lines["total"]
    assert f"{best.tokens_per_second:,.0f}" == lines["tokens/s/GPU"]
    for name, part in best.memory.parts.items():
        assert part.text in lines[name]
    for name, part in best.step.parts.items():
        assert part.text in lines[name]


def test_the_command(illada: Illada) -> None:
    plain = illada("plan", "--config", "illada-8b", "--gpus", 1, "--gpus", 8, "--top", 3)
    assert plain.code == 0
    assert "no layout fits" in plain.out  # 7.6 billion parameters and their optimizer on one GPU
    assert "layouts fit into 94% of" in plain.out
    assert "the configuration's own, TP1 PP1" in plain.out
    best = illada("plan", "--config", "illada-8b", "--gpus", 8, "--explain", 1)
    assert "FLOPs of a token" in best.out
    own = illada("plan", "--config", "illada-8b", "--gpus", 8, "--explain", 0)
    assert "TP1 PP1 VP1 CP1 DP8, 8 GPUs, bf16" in own.out
    data = json.loads(illada("plan", "--config", "illada-8b", "--gpus", 8, "--json", "--precision", "bf16").out)
    assert data["gpus"] == 8
    assert {one["precision"] for one in data["layouts"]} == {"bf16"}
    first = data["layouts"][0]
    assert first["memory_total_bytes"] == pytest.approx(sum(first["memory_bytes"].values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to plan"),
        (["--config", "illada-8b", "--failures"], "say what to plan"),
        (["--config", "illada-8b", "--fewer"], "--fewer: no use with --config"),
        (["--config", "illada-8b", "--gpus-per-node", "4"], "--gpus-per-node: no use with --config"),
        (["--failures", "--top", "3"], "--top: no use with --failures"),
        (["--failures", "training.lr=1e-3"], "overrides: no use with --failures"),
        (["--config", "illada-8b", "--device", "h1000"], "device h1000: there are b200, h100, h200"),
        (["--config", "illada-8b", "--precision", "fp4"], "--precision fp4: expected bf16 or fp8"),
        (["--config", "illada-8b", "--gpus", "8", "--explain", "100000"], "layouts fit"),
        (["--config", "illada-8b", "--gpus", "37"], "no layout divides the batch"),
        (
            [
                *("--config", "illada-8b", "--gpus", "8", "--precision", "fp8", "--device", "b200"),
                *("fp8.recipe=mxfp8", "fp8.param_gather=true"),
            ],
            "no layout in FP8: fp8.param_gather true with fp8.recipe mxfp8",
        ),
    ],
)
def test_what_cannot_be_planned(illada: Illada, arguments: list[str], message: str) -> None:
    outcome = illada("plan", *arguments)
    assert message in outcome.out + outcome.err


def test_help_names_the_presets() -> None:
    option = get_args(ConfigOption)[1]
    assert all(name in option.help for name in preset_names())


def test_a_device_of_ones_own(tmp_path: Path, illada: Illada) -> None:
    text = (Path(__file__).parents[2] / "illada_megatron" / "planning" / "devices" / "h100.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("NVIDIA H100 SXM 80 GB", "Mine"))
    assert "8 x Mine" in illada("plan", "--config", "illada-8b", "--gpus", 8, "--device", mine, "--top", 1).out
    mine.write_text(text.replace("gpus_per_node: 8", "gpus_per_node: eight"))
    assert "not a device" in illada("plan", "--config", "illada-8b", "--gpus", 8, "--device", mine).err

"""What a run leaves to be read: TensorBoard scalars and one JSON object a step, the same numbers in both."""

import json
import math
from pathlib import Path

import pytest
from launch import Illada
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCALARS = {
    "loss/nats_per_token": "loss",
    "loss/masked_cross_entropy_nats": "masked_cross_entropy",
    "optimizer/grad_norm": "grad_norm",
    "optimizer/learning_rate": "lr",
    "speed/tokens_per_second": "tokens_per_second",
    "speed/tflops_per_device": "tflops",
    "speed/step_seconds": "seconds",
    "speed/mfu": "mfu",
    "progress/consumed_samples": "consumed_samples",
    "progress/consumed_tokens": "consumed_tokens",
    "speed/data_wait_seconds": "data_wait_seconds",
}


def _events(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def test_tensorboard_and_jsonl_hold_every_figure(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    board, jsonl = tmp_path / "board", tmp_path / "below" / "steps.jsonl"
    outcome = illada(
        "train",
        *tiny_run,
        *(f"logging.tensorboard_dir={board}", f"logging.jsonl_path={jsonl}"),
        *("runtime.peak_tflops=0.5", "validation.interval_steps=3", "logging.interval_steps=2"),
    )
    assert outcome.code == 0, outcome.err
    steps = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert set(steps[0]) >= {"step", "cross_entropy_by_t", *SCALARS.values()}
    assert [step["consumed_samples"] for step in steps] == [4, 8, 12]
    assert [step["consumed_tokens"] for step in steps] == [128, 256, 384]
    for step in steps:
        assert step["tokens_per_second"] == pytest.approx(128 / step["seconds"])
        assert step["mfu"] == pytest.approx(step["tflops"] / 0.5)

    events = _events(board)
    for tag, name in SCALARS.items():
        values = events.Scalars(tag)
        assert [event.step for event in values] == [1, 2, 3], tag
        assert [event.value for event in values] == pytest.approx([step[name] for step in steps], rel=1e-6), tag
    values = [event.value for event in events.Scalars("progress/epoch")]
    assert values == pytest.approx([step["epochs"][""] for step in steps], rel=1e-6)
    for bucket in range(10):
        tag = f"masked_cross_entropy_by_t_nats/{bucket / 10:.1f}-{(bucket + 1) / 10:.1f}"
        filled = {step["step"]: value for step in steps if (value := step["cross_entropy_by_t"][bucket]) is not None}
        found = {event.step: event.value for event in events.Scalars(tag)} if filled else {}
        assert found == pytest.approx(filled, rel=1e-6), tag
    (bound,), (error,) = (
        events.Scalars(f"validation/bound_nats_per_token{which}") for which in ("", "_standard_error")
    )
    assert (bound.step, error.step) == (3, 3)
    assert f"held-out bound {bound.value:.4f} +- {error.value:.4f} nats/token  (160 tokens)" in outcome.out
    assert math.isfinite(bound.value)
    # no step comes that the last validation's figures could stand with
    (held_out,) = steps[-1]["held_out"]
    assert (held_out["step"], held_out["ema"]) == (3, False)
    assert held_out["mean"]["nats_per_token"] == pytest.approx(
        {"value": bound.value, "standard_error": error.value}, rel=1e-6
    )
    for place, name in (("t", "by_t"), ("position", "by_position")):
        for part in held_out["mean"][f"{name}_nats_per_token"]:
            if part is not None:
                tag = f"validation_by_{place}_nats_per_token/{part['from']}-{part['to']}"
                assert events.Scalars(tag)[0].value == pytest.approx(part["value"], rel=1e-6)
    lines = [line for line in outcome.out.splitlines() if " tokens/s" in line]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    for part in (f"{steps[2]['loss']:.4f} nats/token", "MFU", "grad norm", "lr", "ETA"):
        assert part in lines[2]


def test_restart_replaces_what_came_after_its_checkpoint(
    tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """A run that crashed at step 2 after its checkpoint of step 1: no step shows twice in TensorBoard."""
    board, save_dir = tmp_path / "board", tmp_path / "checkpoints"
    arguments = [*tiny_run, f"logging.tensorboard_dir={board}", f"checkpoint.save_dir={save_dir}"]
    assert illada("train", *arguments, "checkpoint.interval_steps=1", "training.exit_steps=2").code == 0
    (save_dir / "step_00000002" / "checkpoint.json").unlink()
    assert illada("train", *arguments).code == 0
    assert [event.step for event in _events(board).Scalars("loss/nats_per_token")] == [1, 2, 3]


def test_nothing_is_written_that_was_not_asked_for(
    tiny_run: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, illada: Illada
) -> None:
    monkeypatch.chdir(tmp_path)
    assert illada("train", *tiny_run, "training.exit_steps=1").code == 0
    assert list(tmp_path.iterdir()) == []

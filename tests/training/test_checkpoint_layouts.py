"""Saved under one layout, loaded under another: the same state bit for bit, the same training from there on.

The matrix takes more than half an hour on two cores; test_resume.py has a few pairs that run always."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import TrainOnce, run_warm
from test_layouts import BF16, INTERLEAVED, OVERLAP, PLAIN, PP2, RELATIVE, SEQUENCE, TP2, assert_same_training

from illada_megatron.checkpoint.files.tensors import TensorReader

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "DP1, plain": (1, (PLAIN,)),
    "DP2": (2, OVERLAP),
    "DP2, plain": (2, (PLAIN,)),
    "TP2, sequence parallel": (2, (TP2, SEQUENCE)),
    "PP2, interleaved, plain": (2, (PP2, INTERLEAVED, PLAIN)),
    "TP2 DP2": (4, (TP2,)),
}
PRECISIONS = {"fp32": (), "bf16": (BF16,)}
# bf16 rounds differently in each layout: ten steps of it before the checkpoint are part of the difference.
BF16_RELATIVE = 0.02
PAIRS = [
    pytest.param(*case, id=" -> ".join(case[:2]) + f", {case[2]}")
    for case in itertools.product(LAYOUTS, LAYOUTS, PRECISIONS)
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """saved(layout, precision) -> the checkpoint of step 10 of 20; made once."""
    made: dict[tuple[str, str], Path] = {}

    def save(layout: str, precision: str) -> Path:
        if (layout, precision) not in made:
            nproc, overrides = LAYOUTS[layout]
            save_dir = tmp_path_factory.mktemp("saved") / "checkpoints"
            stop = ["training.exit_steps=10", f"checkpoint.save_dir={save_dir}"]
            run = run_warm("train", [*small, *overrides, *PRECISIONS[precision], *stop], nproc)
            assert run.process.returncode == 0, run.output
            made[layout, precision] = save_dir / "step_00000010"
        return made[layout, precision]

    return save


@pytest.mark.parametrize(("saved_under", "loaded_under", "precision"), PAIRS)
def test_state_is_the_same_and_trains_the_same(
    saved_under: str,
    loaded_under: str,
    precision: str,
    saved: Callable[[str, str], Path],
    small: tuple[str, ...],
    train_once: TrainOnce,
    tmp_path: Path,
) -> None:
    """Loaded and saved again at once, no bit of weights, main weights and moments has changed; the ten steps from
    there are those of a run that was under the second layout all the time."""
    checkpoint = saved(saved_under, precision)
    nproc, overrides = LAYOUTS[loaded_under]
    arguments = [*small, *overrides, *PRECISIONS[precision], f"checkpoint.load_dir={checkpoint}"]
    again = run_warm("train", [*arguments, "training.exit_steps=10", f"checkpoint.save_dir={tmp_path}/again"], nproc)
    assert again.process.returncode == 0, again.output
    ours, theirs = TensorReader(tmp_path / "again" / "step_00000010"), TensorReader(checkpoint)
    assert set(ours.tensors) == set(theirs.tensors)
    per_parameter = 4 if precision == "bf16" else 3
    assert len(theirs.tensors) == per_parameter * (2 + 6 * 4)
    for name in theirs.tensors:
        assert torch.equal(ours.read(name), theirs.read(name)), name
    resumed = run_warm("train", arguments, nproc, jsonl=tmp_path / "resumed.jsonl")
    assert resumed.process.returncode == 0, resumed.output
    reference = train_once(nproc, *overrides, *PRECISIONS[precision]).steps[10:]
    if precision == "fp32":
        assert_same_training(resumed.steps, reference, RELATIVE)
        return
    assert [step["step"] for step in resumed.steps] == [step["step"] for step in reference]
    for own, expected in zip(resumed.steps, reference, strict=True):
        assert own["masked_cross_entropy"] == pytest.approx(expected["masked_cross_entropy"], rel=BF16_RELATIVE)

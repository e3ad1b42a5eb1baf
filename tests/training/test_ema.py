"""The moving average of the weights: what it is, that no layout, restart, bad step or rollback changes it, and what
takes the weights' place with it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import Illada, Run, TrainOnce, launch
from test_layouts import INTERLEAVED, PLAIN, PP2, RELATIVE, SEQUENCE, TP2, assert_same_training

from illada_megatron.checkpoint.files.names import EMA, split_name, tensor_name
from illada_megatron.checkpoint.files.tensors import TensorReader

DECAY = 0.9
KEEP = f"optimizer.ema_decay={DECAY}"
EVERY = "checkpoint.interval_steps=1"


@pytest.fixture(scope="module")
def kept(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Run]]:
    """kept(nproc, *overrides) -> (save_dir, run) of 12 steps with the average kept; made once."""
    made: dict[tuple[int, tuple[str, ...]], tuple[Path, Run]] = {}

    def train(nproc: int, *overrides: str) -> tuple[Path, Run]:
        if (nproc, overrides) not in made:
            directory = tmp_path_factory.mktemp("ema")
            arguments = [*small, KEEP, *overrides, "training.exit_steps=12", f"checkpoint.save_dir={directory / 'c'}"]
            run = launch("train", arguments, nproc, directory / "steps.jsonl")
            assert run.process.returncode == 0, run.output
            made[nproc, overrides] = directory / "c", run
        return made[nproc, overrides]

    return train


def _tensors(save_dir: Path, step: int, state: str) -> dict[str, torch.Tensor]:
    reader = TensorReader(save_dir / f"step_{step:08d}")
    names = {name: split_name(name) for name in reader.tensors}
    return {one.parameter: reader.read(name) for name, one in names.items() if one.state == state}


def _assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rtol: float = 1e-3) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_is_the_average_of_the_weights_of_each_step(kept: Callable) -> None:
    """By the recurrence, from the weights that were saved after each step: another decay, one step more or less, a
    start elsewhere than at the first weights would show."""
    save_dir, _ = kept(1, EVERY)
    (first,) = {tuple(sorted(_tensors(save_dir, step, EMA))) for step in (1, 12)}
    assert "embedding.word_embeddings.weight" in first
    expected = _tensors(save_dir, 1, EMA)
    for step in range(2, 13):
        updates = step - 1
        decay = min(DECAY, (1 + updates) / (10 + updates))
        weights = _tensors(save_dir, step, "")
        expected = {name: decay * average + (1 - decay) * weights[name] for name, average in expected.items()}
        _assert_close(_tensors(save_dir, step, EMA), expected, rtol=1e-5)
    weights = _tensors(save_dir, 12, "")
    assert not torch.allclose(expected["decoder.final_layernorm.weight"], weights["decoder.final_layernorm.weight"])


def test_changes_no_training(kept: Callable, train_once: TrainOnce) -> None:
    _, run = kept(1, EVERY)
    for ours, theirs in zip(run.steps, train_once(1).steps, strict=False):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


LAYOUTS = {
    "DP2": (2, ()),
    "TP2, sequence parallel": (2, (TP2, SEQUENCE)),
    "PP2, interleaved, plain optimizer": (2, (PP2, INTERLEAVED, PLAIN)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_in_every_layout(layout: str, kept: Callable) -> None:
    """The average that is saved, and its held-out figure, which the run prints beside that of the weights."""
    nproc, overrides = LAYOUTS[layout]
    (save_dir, run), (reference, one) = kept(nproc, *overrides), kept(1, EVERY)
    assert_same_training(run.steps, one.steps, RELATIVE)
    _assert_close(_tensors(save_dir, 12, EMA), _tensors(reference, 12, EMA))
    ours, theirs = (re.findall(r"step +10  EMA: held-out bound (\S+)", each.process.stdout) for each in (run, one))
    assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=2e-4)
    assert theirs != re.findall(r"step +10  held-out bound (\S+)", one.process.stdout)


@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [(1, ()), (2, ()), (2, (TP2, PLAIN))],
    ids=["DP1", "DP2", "TP2, plain optimizer"],
)
def test_goes_on_from_a_checkpoint(
    nproc: int, overrides: tuple[str, ...], kept: Callable, small: tuple[str, ...], tmp_path: Path
) -> None:
    """From step 6 of one rank's run to step 12, in the same layout to the last bit: the average and the count of its
    steps, which its decay depends on, are restored."""
    reference, _ = kept(1, EVERY)
    start = reference / "step_00000006"
    arguments = [*small, KEEP, *overrides, "training.exit_steps=12", f"checkpoint.save_dir={tmp_path / 'c'}"]
    run = launch("train", [*arguments, f"checkpoint.load_dir={start}"], nproc)
    assert run.process.returncode == 0, run.output
    ours, theirs = _tensors(tmp_path / "c", 12, EMA), _tensors(reference, 12, EMA)
    if nproc == 1:
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    _assert_close(ours, theirs)


def test_begins_at_the_weights_of_an_older_checkpoint(
    kept: Callable, small: tuple[str, ...], two_steps: Path, tiny_run: tuple[str, ...], tmp_path: Path
) -> None:
    """And says so; without optimizer.ema_decay it is left behind, which is said too."""
    arguments = ["training.exit_steps=3", f"checkpoint.load_dir={two_steps}", f"checkpoint.save_dir={tmp_path / 'c'}"]
    run = launch("train", [*tiny_run, KEEP, *arguments])
    assert run.process.returncode == 0, run.output
    assert "the moving average of the weights begins at those of" in run.process.stdout
    before, after = _tensors(two_steps, 2, ""), _tensors(tmp_path / "c", 3, "")
    expected = {name: 0.1 * before[name] + 0.9 * after[name] for name in after}
    _assert_close(_tensors(tmp_path / "c", 3, EMA), expected, rtol=1e-5)
    save_dir, _ = kept(1, EVERY)
    run = launch("train", [*small, f"checkpoint.load_dir={save_dir}", "training.exit_steps=13"])
    assert run.process.returncode == 0, run.output
    assert "is left behind: optimizer.ema_decay is not set" in " ".join(run.process.stdout.split())


def test_evaluated_and_generated_with(kept: Callable, illada: Illada, two_steps: Path) -> None:
    """`evaluate --ema` says what the run said of the average; a checkpoint without one is an error that says so."""
    save_dir, run = kept(1, EVERY)
    printed = re.findall(r"step +10  (EMA: )?held-out bound (\S+)", run.process.stdout)
    assert len(printed) == 2
    for mark, bound in printed:
        found = illada(
            "evaluate", "--checkpoint", save_dir / "step_00000010", *(["--ema"] if mark else []), "runtime.device=cpu"
        )
        assert found.code == 0, found.err
        assert f"held-out bound {bound} nats/token" in found.out
    found = illada("evaluate", "--checkpoint", two_steps, "--ema", "runtime.device=cpu")
    assert found.code == 2
    assert "holds no moving average of the weights" in found.err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exported(precision: str, kept: Callable, illada: Illada, tmp_path: Path) -> None:
    """`to-hf --ema` writes the average: its embedding is that of the checkpoint's."""
    from safetensors.torch import load_file

    save_dir, _ = kept(1, *([EVERY] if precision == "fp32" else ["training.precision=bf16"]))
    options = ("--ema", "--dtype", "fp32", "--no-tokenizer", "--verify")
    found = illada("convert", "to-hf", save_dir, tmp_path / "hf", *options)
    assert found.code == 0, found.err
    embedding = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, _tensors(save_dir, 12, EMA)["embedding.word_embeddings.weight"][:250])


def test_resharded(kept: Callable, illada: Illada, tmp_path: Path) -> None:
    """It goes with a reshard to the last bit, and is left out of Megatron's format, which is said."""
    save_dir, _ = kept(1, EVERY)
    resharded = illada("checkpoint", "reshard", save_dir, tmp_path / "new", "--tp", "2", "--pp", "2")
    assert resharded.code == 0, resharded.err
    ours, theirs = _tensors(tmp_path / "new", 12, EMA), _tensors(save_dir, 12, EMA)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "EMA of the weights" in illada("checkpoint", "inspect", tmp_path / "new").out
    legacy = illada("checkpoint", "reshard", save_dir, tmp_path / "megatron", "--format", "legacy")
    assert legacy.code == 0, legacy.err
    assert "moving average of the weights is left out" in legacy.out
    back = illada("checkpoint", "inspect", tmp_path / "megatron", "--set", "model.mask_token_id=5")
    assert back.code == 0, back.err
    assert tensor_name("", EMA) not in back.out

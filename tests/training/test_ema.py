"""The moving average of the weights: what it is, that no layout, restart, bad step or rollback changes it, and what
takes the weights' place with it."""

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch import Illada, Run, TrainOnce, run_warm
from test_layouts import INTERLEAVED, PLAIN, PP2, RELATIVE, SEQUENCE, TP2, assert_same_training

from illada_megatron.checkpoint.files.names import EMA, split_name
from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.checkpoint.lazy_snapshot import Handover
from illada_megatron.checkpoint.owner import owned
from illada_megatron.checkpoint.saver import Saver
from illada_megatron.checkpoint.state import held_parameters, optimizer_shards
from illada_megatron.checkpoint.store import newest_complete
from illada_megatron.config import load_config
from illada_megatron.runtime import runtime
from illada_megatron.training.setup import TrainingState, restore, setup
from illada_megatron.training.trainer import train_step

DECAY = 0.9
KEEP = f"optimizer.ema_decay={DECAY}"
# the other options of the model and the optimizer are on in all runs here: the layouts agree on them too
OPTIONS = (
    *("model.qk_layernorm=true", "optimizer.embedding_weight_decay=0.0", "optimizer.embedding_lr_mult=0.5"),
    "model.rope_scaling={rope_type: yarn, factor: 4.0, original_max_position_embeddings: 16}",
)
EVERY = "checkpoint.interval_steps=1"


@pytest.fixture(scope="module")
def kept(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Run]]:
    """kept(nproc, *overrides) -> (save_dir, run) of 12 steps with the average kept; made once."""
    made: dict[tuple[int, tuple[str, ...]], tuple[Path, Run]] = {}

    def train(nproc: int, *overrides: str) -> tuple[Path, Run]:
        if (nproc, overrides) not in made:
            directory = tmp_path_factory.mktemp("ema")
            arguments = [*small, KEEP, *OPTIONS, *overrides, "training.exit_steps=12"]
            run = run_warm(
                "train", [*arguments, f"checkpoint.save_dir={directory / 'c'}"], nproc, directory / "steps.jsonl"
            )
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


@pytest.mark.slow
def test_options_change_what_is_learned(kept: Callable, train_once: TrainOnce) -> None:
    """Each of them by itself, but the average, which changes nothing."""
    _, run = kept(1, EVERY)
    expected = train_once(1, *OPTIONS).steps
    for ours, theirs in zip(run.steps, expected, strict=False):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    plain = train_once(1).steps
    for option in OPTIONS:
        changed = train_once(1, option).steps
        # far above rounding, which one process has not: attention of so small a model hardly feels its frequencies
        assert sum(abs(a["loss"] / b["loss"] - 1) > 1e-6 for a, b in zip(changed, plain, strict=True)) > 10, option


@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [
        (2, (TP2, SEQUENCE)),
        (2, (PP2, INTERLEAVED, PLAIN)),
        pytest.param(2, (), marks=pytest.mark.slow),
        pytest.param(2, (TP2,), marks=pytest.mark.slow),
        pytest.param(8, (TP2, PP2), marks=pytest.mark.slow),
    ],
    ids=["TP2, sequence parallel", "PP2, interleaved, plain optimizer", "DP2", "TP2", "TP2 PP2 DP2"],
)
def test_same_in_every_layout(nproc: int, overrides: tuple[str, ...], kept: Callable) -> None:
    """Training with all options, the average that is saved, and its held-out figure, which the run prints beside that
    of the weights. Norms of queries and keys are whole on each tensor-parallel rank, which has a part of the heads: a
    gradient that is not summed, or twice, would show."""
    (save_dir, run), (reference, one) = kept(nproc, *overrides), kept(1, EVERY)
    assert_same_training(run.steps, one.steps, RELATIVE)
    _assert_close(_tensors(save_dir, 12, EMA), _tensors(reference, 12, EMA))
    ours, theirs = (re.findall(r"step +10  EMA: held-out bound (\S+)", each.process.stdout) for each in (run, one))
    assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=2e-4)
    assert theirs != re.findall(r"step +10  held-out bound (\S+)", one.process.stdout)


@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [(1, ()), (2, ()), pytest.param(2, (TP2, PLAIN), marks=pytest.mark.slow)],
    ids=["DP1", "DP2", "TP2, plain optimizer"],
)
def test_goes_on_from_a_checkpoint(
    nproc: int, overrides: tuple[str, ...], kept: Callable, small: tuple[str, ...], tmp_path: Path
) -> None:
    """From step 6 of one rank's run to step 12, in the same layout to the last bit: the average and the count of its
    steps, which its decay depends on, are restored."""
    reference, one = kept(1, EVERY)
    arguments = [*small, KEEP, *OPTIONS, *overrides, "training.exit_steps=12", f"checkpoint.save_dir={tmp_path / 'c'}"]
    run = run_warm(
        "train", [*arguments, f"checkpoint.load_dir={reference / 'step_00000006'}"], nproc, tmp_path / "jsonl"
    )
    assert run.process.returncode == 0, run.output
    assert_same_training(run.steps, one.steps[6:], RELATIVE)
    ours, theirs = _tensors(tmp_path / "c", 12, EMA), _tensors(reference, 12, EMA)
    if nproc == 1:
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    _assert_close(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", ["true", "false"])
def test_takes_the_weights_place_and_gives_it_back(
    precision: str, sharded: str, tiny_run: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also while a save is being written; and a return to a checkpoint takes the average and its count
    back too. An older checkpoint has none: it begins at the weights, and the run says so."""
    options = [f"training.precision={precision}", f"parallel.use_distributed_optimizer={sharded}"]
    options += [f"checkpoint.save_dir={tmp_path}"]
    config = load_config(None, [*tiny_run, KEEP, *options])
    may_write, take = threading.Event(), Handover._take
    monkeypatch.setattr(Handover, "_take", lambda handover: may_write.wait() and take(handover))
    with runtime(config) as run, owned(str(tmp_path), print) as owner, Saver(config, {}, None, owner) as saver:
        state = setup(config, run)
        assert state.ema is not None
        models = [chunk.module for chunk in state.chunks]
        train_step(state)
        before, count = _everything(state), state.ema.updates
        saver.save(1, models, state.optimizer, {**state.progress(), "bad_steps": {}})
        saver.secure()
        with state.ema.as_weights():
            may_write.set()
            saver.wait()
        assert _same(_everything(state), before)
        train_step(state)
        after = _everything(state)
        assert not torch.equal(
            after["ema/decoder.final_layernorm.weight"], before["ema/decoder.final_layernorm.weight"]
        )
        with state.ema.as_weights():
            for name, weight in models[0].named_parameters():
                if "output_layer" not in name:
                    assert torch.equal(weight, after[f"ema/{name}"].view_as(weight).to(weight.dtype)), name
        assert _same(_everything(state), after)
        info, _ = newest_complete(tmp_path)
        assert info is not None
        load = replace(info, fingerprints=state.fingerprints)
        restore(state, load)
        assert _same(_everything(state), before)
        assert state.ema.updates == count == 1
        train_step(state)
        progress = dict(load.progress or {})
        del progress["ema"]
        restore(state, replace(load, progress=progress))
        assert state.ema.updates == 0
        assert state.notes[-2].startswith("the moving average of the weights begins at those of")
        state.close()


def _everything(state: TrainingState) -> dict[str, torch.Tensor]:
    models = [chunk.module for chunk in state.chunks]
    shards = optimizer_shards(state.optimizer, held_parameters(models, state.config.model))
    kept = {
        f"{kind}/{name}": one.state[kind] for name, one in shards.items() for kind in (EMA, "exp_avg", "exp_avg_sq")
    }
    kept |= {f"main/{name}": one.main for name, one in shards.items()} | dict(models[0].named_parameters())
    return {name: value.detach().clone() for name, value in kept.items()}


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_left_behind(kept: Callable, small: tuple[str, ...], two_steps: Path, tiny_run: tuple[str, ...]) -> None:
    """A run without optimizer.ema_decay says that a checkpoint has an average; one with it, that one has none."""
    save_dir, _ = kept(1, EVERY)
    for arguments, load_dir, said in (
        ((*small, *OPTIONS), save_dir, "is left behind: optimizer.ema_decay is not set"),
        ((*tiny_run, KEEP), two_steps, "the moving average of the weights begins at those of"),
    ):
        config = load_config(None, [*arguments, f"checkpoint.load_dir={load_dir}"])
        with runtime(config) as run:
            state = setup(config, run)
            assert any(said in note for note in state.notes), state.notes
            state.close()


def test_evaluated_and_generated_with(kept: Callable, illada: Illada, two_steps: Path, small: tuple[str, ...]) -> None:
    """`evaluate --ema` says what the run said of the average; a checkpoint without one is an error that says so."""
    save_dir, run = kept(1, EVERY)
    samples = next(one for one in small if one.startswith("validation.num_samples=")).partition("=")[2]
    printed = re.findall(r"step +10  (EMA: )?held-out bound (\S+)", run.process.stdout)
    assert len(printed) == 2
    for mark, bound in printed:
        found = illada(
            *("evaluate", "--checkpoint", save_dir / "step_00000010", *(["--ema"] if mark else [])),
            *("runtime.device=cpu", f"validation.evaluate_samples={samples}"),
        )
        assert found.code == 0, found.err
        assert f"held-out bound {bound} +- " in found.out
    found = illada("evaluate", "--checkpoint", two_steps, "--ema", "runtime.device=cpu")
    assert found.code == 2
    assert "holds no moving average of the weights" in found.err


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_exported(precision: str, kept: Callable, illada: Illada, tmp_path: Path) -> None:
    """`to-hf --ema` writes the average: its embedding is that of the checkpoint's."""
    from safetensors.torch import load_file

    save_dir, _ = kept(1, *([EVERY] if precision == "fp32" else ["training.precision=bf16"]))
    options = ("--ema", "--dtype", "fp32", "--no-tokenizer", "--verify")
    found = illada("convert", "to-hf", save_dir, tmp_path / "hf", *options)
    assert found.code == 0, found.err
    embedding = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, _tensors(save_dir, 12, EMA)["embedding.word_embeddings.weight"][:250])

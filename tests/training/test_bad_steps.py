"""A step whose loss or gradient is not finite, made by weights: one row of the input embedding is infinite, so that
exactly the batches are bad in which that token is visible. No other part of the program knows of it."""

import itertools
import json
import math
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launch import Illada, Run, launch, run_warm, wait_for_step
from test_layouts import BUCKETS, OVERLAP, PLAIN, PP2, SEQUENCE, TP2

from illada_megatron.checkpoint.owner import owned
from illada_megatron.checkpoint.saver import Saver
from illada_megatron.checkpoint.state import held_parameters, optimizer_shards
from illada_megatron.config import load_config
from illada_megatron.config.schema import FaultsConfig
from illada_megatron.data.corpus.configured import training_corpus
from illada_megatron.diffusion import make_masked_batch
from illada_megatron.runtime import runtime
from illada_megatron.training.bad_steps import BadStep, BadSteps
from illada_megatron.training.schedule import global_batch_size, next_batch, samples_of_run
from illada_megatron.training.setup import TrainingState, setup
from illada_megatron.training.trainer import train_step

UNTIED = "model.tie_word_embeddings=false"  # else the head is infinite too, and every batch is bad
FLAT = ("schedule.warmup_steps=0", "schedule.decay_start=never")  # the rate says nothing of the step
RELATIVE = 1e-4
STEPS = 20


@dataclass(frozen=True)
class Poisoned:
    """A run's checkpoint with an infinite row, and what has to come of it."""

    arguments: tuple[str, ...]
    """Of `train`: begins there and stops at step 20."""
    bad_steps: list[int]
    """Of steps 3 to 20, counted from 1."""
    bad_samples: list[int]
    """Those whose loss is not finite: where nothing is masked that attends to the token, only the gradient is not."""
    seen_in: list[bool]
    """By sample: whether the token is visible in it."""


def _poison(state: TrainingState, token: int) -> None:
    (row,) = [chunk.module.embedding.word_embeddings.weight for chunk in state.chunks]
    with torch.no_grad():
        row[token] = math.inf
    state.optimizer.reload_model_params()


@pytest.fixture(scope="module")
def poisoned(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    """Two good steps, then the row of a token that four of the next eighteen batches see, or nearly."""
    directory = tmp_path_factory.mktemp("poisoned")
    arguments = (*small, UNTIED, "validation.interval_steps=null")
    config = load_config(None, [*arguments, f"checkpoint.save_dir={directory}"])
    corpus = training_corpus(config.data, config.training.seed, config.model.vocab_size, None)
    batch = make_masked_batch(corpus, range(8 * 60), config.diffusion, config.model.mask_token_id, config.training.seed)
    seen = [set(row.tolist()) for row in batch.tokens]
    offsets = batch.cu_seqlens.tolist()
    tokens, masked = batch.tokens.flatten(), batch.loss_weight.flatten() > 0
    segments = [slice(*ends) for ends in itertools.pairwise(offsets)]

    def bad(token: int) -> list[int]:
        return [step for step in range(3, STEPS + 1) if any(token in one for one in seen[8 * step - 8 : 8 * step])]

    token = min(range(6, 250), key=lambda one: abs(len(bad(one)) - 4))
    with (
        runtime(config) as run,
        owned(config.checkpoint.save_dir, print) as owner,
        Saver(config, {}, None, owner) as saver,
    ):
        state = setup(config, run)
        for _ in range(2):
            train_step(state)
        _poison(state, token)
        saver.save(2, [chunk.module for chunk in state.chunks], state.optimizer, state.progress())
        (outcome,) = saver.wait()
        assert outcome.error is None
        state.close()
    loss_of = {
        segment.start // config.data.sequence_length
        for segment in segments
        if token in tokens[segment] and masked[segment].any()
    }
    return Poisoned(
        (*arguments, f"checkpoint.load_dir={directory}", "checkpoint.allow_mismatch=[data,tokenizer]"),
        bad(token),
        [sample for step in bad(token) for sample in range(8 * step - 8, 8 * step) if sample in loss_of],
        [token in one for one in seen],
    )


@pytest.fixture(scope="module")
def run_from_there(poisoned: Poisoned, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """run_from_there(nproc, *overrides): the whole run, made once."""
    made: dict[tuple[int, tuple[str, ...]], Run] = {}

    def go(nproc: int, *overrides: str) -> Run:
        if (nproc, overrides) not in made:
            jsonl = tmp_path_factory.mktemp("run") / "steps.jsonl"
            run = run_warm("train", [*poisoned.arguments, *overrides], nproc, jsonl)
            assert run.process.returncode == 0, run.output
            made[nproc, overrides] = run
        return made[nproc, overrides]

    return go


def _assert_same_steps(found: list[dict[str, Any]], expected: list[dict[str, Any]], relative: float = RELATIVE) -> None:
    assert [one["step"] for one in found] == [one["step"] for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("skipped", "bad_samples", "first_sample", "consumed_samples", "lr", "skipped_steps"):
            assert ours[name] == theirs[name], (ours["step"], name)
        for name in ("loss", "grad_norm"):
            assert ours[name] == (theirs[name] and pytest.approx(theirs[name], rel=relative)), (ours["step"], name)


def test_the_bad_steps_are_those_that_see_the_token(poisoned: Poisoned, run_from_there: Callable[..., Run]) -> None:
    """They are skipped and named to the sample, the others are trained; the rate follows the steps all the same."""
    run = run_from_there(1, "faults.max_bad_steps=20")
    steps = run.steps
    assert 2 <= len(poisoned.bad_steps) <= 8
    assert [one["step"] for one in steps if one["skipped"]] == poisoned.bad_steps
    assert [sample for one in steps for sample in one["bad_samples"]] == poisoned.bad_samples
    assert poisoned.bad_samples
    assert all((one["loss"] is None) == bool(one["bad_samples"]) for one in steps)
    assert [one["consumed_samples"] for one in steps] == [8 * step for step in range(3, 21)]
    assert steps[-1]["skipped_steps"] == len(poisoned.bad_steps)
    assert run.process.stdout.count("weights and optimizer stay as they were") == len(poisoned.bad_steps)
    first = next(one for one in steps if one["bad_samples"])
    assert f"samples {first['first_sample']} to {first['consumed_samples'] - 1}; not finite in" in run.process.stdout


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        pytest.param(2, OVERLAP, marks=pytest.mark.slow),
        (2, (TP2, SEQUENCE)),
        pytest.param(2, (PP2, PLAIN), marks=pytest.mark.slow),
    ],
    ids=["DP2, overlapped", "TP2, sequence parallel", "PP2, plain optimizer"],
)
def test_all_ranks_skip_alike(nproc: int, layout: tuple[str, ...], run_from_there: Callable[..., Run]) -> None:
    """One rank alone sees the token (DP), holds its row (TP) or the embedding (PP): if it skipped alone, or not, the
    losses after it would differ, or the run would hang."""
    found = run_from_there(nproc, "faults.max_bad_steps=20", *layout)
    _assert_same_steps(found.steps, run_from_there(1, "faults.max_bad_steps=20").steps)


@dataclass(frozen=True)
class _Everything:
    """What a step can change."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    steps: set[int]


def _everything(state: TrainingState) -> _Everything:
    models = [chunk.module for chunk in state.chunks]
    held = held_parameters(models, state.config.model)
    optimizer = {
        f"{name}/{kind}": tensor.clone()
        for name, shard in optimizer_shards(state.optimizer, held).items()
        for kind, tensor in {"main": shard.main, **shard.state}.items()
        if isinstance(tensor, torch.Tensor)
    }
    weights = {name: value.detach().clone() for model in models for name, value in model.named_parameters()}
    return _Everything(weights, optimizer, {group["step"] for group in state.optimizer.param_groups})


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", ["true", "false"])
@pytest.mark.parametrize(("clip_grad", "value"), [("0.5", math.inf), ("0", 1e30)])
def test_a_bad_step_changes_nothing(
    precision: str, sharded: str, clip_grad: str, value: float, tiny_run: tuple[str, ...]
) -> None:
    """To the bit: weights, fp32 main weights, both moments, the weights' average, Adam's count. Weights of 1e30 leave
    the loss a number and make the gradient NaN; infinite ones make both."""
    options = [f"parallel.use_distributed_optimizer={sharded}", f"optimizer.clip_grad={clip_grad}"]
    options += ["optimizer.ema_decay=0.9"]
    config = load_config(None, [*tiny_run, f"training.precision={precision}", *options])
    with runtime(config) as run:
        state = setup(config, run)
        assert state.ema is not None
        assert not train_step(state)[0].skipped
        models = [chunk.module for chunk in state.chunks]
        kept = [parameter.detach().clone() for parameter in models[0].parameters()]
        with torch.no_grad():
            for parameter in models[0].parameters():
                parameter.fill_(value)
        before = _everything(state)
        assert before.steps == {1}
        record, _ = train_step(state)
        assert record.skipped
        assert math.isfinite(record.loss) == math.isfinite(value)
        after = _everything(state)
        assert _same(after.weights, before.weights)
        assert _same(after.optimizer, before.optimizer)
        assert after.steps == {1}
        assert state.ema.updates == 1
        with torch.no_grad():
            for parameter, value in zip(models[0].parameters(), kept, strict=True):
                parameter.copy_(value)
        record, _ = train_step(state)
        assert not record.skipped
        assert math.isfinite(record.loss)
        good = _everything(state)
        assert good.steps == {2}
        moments = [name for name in good.optimizer if not name.endswith("/main")]
        assert len(moments) >= 2 * 11
        print([name for name in moments if torch.equal(good.optimizer[name], before.optimizer[name])])
        assert not any(torch.equal(good.optimizer[name], before.optimizer[name]) for name in moments)
        assert (state.step, state.consumed_samples) == (3, 12)
        state.close()


def _rollback_options(save_dir: Path) -> tuple[str, ...]:
    return (
        *("faults.on_bad_steps=rollback", "faults.max_bad_steps=1", "faults.rollback_margin_steps=0"),
        *("faults.max_rollbacks=20", "checkpoint.interval_steps=3", f"checkpoint.save_dir={save_dir}", *FLAT),
    )


@pytest.fixture(scope="module")
def good_steps(run_from_there: Callable[..., Run]) -> list[dict[str, Any]]:
    """The steps of a run that skips the bad ones: at a constant rate, what a run that passes over them computes."""
    run = run_from_there(1, "faults.max_bad_steps=99", "training.train_steps=30", *FLAT)
    return [one for one in run.steps if not one["skipped"]]


def _assert_passed_over(steps: list[dict[str, Any]], good_steps: list[dict[str, Any]], relative: float = 0.0) -> None:
    assert [one["step"] for one in steps] == list(range(3, STEPS + 1))
    assert not any(one["skipped"] for one in steps)
    for ours, theirs in zip(steps, good_steps, strict=False):
        assert ours["first_sample"] == theirs["first_sample"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=relative, abs=0.0)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=relative, abs=0.0)


def test_rollback_passes_over_the_samples(poisoned: Poisoned, good_steps: list[dict[str, Any]], tmp_path: Path) -> None:
    """The running process goes back, does the steps since the checkpoint again, and takes other samples in place of the
    bad ones: to the bit what a run computes that never applied them. A weight, a moment or a count that was not taken
    back would show. Interrupted by SIGUSR1 and continued, it remembers what it passed over."""
    jsonl = tmp_path / "steps.jsonl"
    arguments = [*poisoned.arguments, *_rollback_options(tmp_path / "checkpoints")]

    def warn(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, poisoned.bad_steps[1] + 1, launcher)
        launcher.send_signal(signal.SIGUSR1)

    interrupted = launch("train", arguments, 1, jsonl, warn)
    assert interrupted.process.returncode == 0, interrupted.output
    assert "stopped by SIGUSR1" in interrupted.output
    finished = run_warm("train", arguments, 1, jsonl)
    assert finished.process.returncode == 0, finished.output
    _assert_passed_over(finished.steps, good_steps)
    output = interrupted.process.stdout + finished.process.stdout
    told = re.findall(r"rolled back from step (\d+) to \S+/step_(\d+): 1 bad steps in a row; samples (\d+)", output)
    passed = {int(sample) for _, _, sample in told}
    assert passed == {8 * step - 8 for step in poisoned.bad_steps} | {
        sample for sample in passed if any(poisoned.seen_in[sample : sample + 8])
    }
    assert all(int(to) < int(source) for source, to, _ in told)
    # the signal may come between a return and the next save: then the return is made, and told, twice
    assert finished.steps[-1]["skipped_steps"] == len(set(told))
    (rollback, *_) = next(one["rollbacks"] for one in finished.steps if "rollbacks" in one)
    assert rollback["bad_samples"] == [[rollback["first_sample"], rollback["end_sample"]]]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [OVERLAP, (*OVERLAP, BUCKETS)], ids=["one bucket", "small buckets"])
def test_rollback_in_another_layout(
    layout: tuple[str, ...], poisoned: Poisoned, good_steps: list[dict[str, Any]], tmp_path: Path
) -> None:
    """With gradients and weights exchanged in the background: what is under way when the run goes back ends first."""
    jsonl = tmp_path / "steps.jsonl"
    run = run_warm("train", [*poisoned.arguments, *_rollback_options(tmp_path / "checkpoints"), *layout], 2, jsonl)
    assert run.process.returncode == 0, run.output
    assert "rolled back from" in run.output
    _assert_passed_over(run.steps, good_steps, RELATIVE)


def test_a_learning_rate_that_overflows(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """A run that diverges: it stops with its last good checkpoint as it was, by itself or after rolling back to no
    avail; where there is no checkpoint to go back to it says so."""
    save_dir = tmp_path / "checkpoints"
    arguments = [*tiny_run, "training.train_steps=40", "training.lr=1e30", "faults.max_bad_steps=2"]
    stopped = illada("train", *arguments, f"checkpoint.save_dir={save_dir}", "checkpoint.interval_steps=1")
    assert stopped.code == 3
    assert "which makes 2 bad steps in a row (faults.max_bad_steps; samples 4 to 11)" in stopped.err
    assert (save_dir / "latest").read_text() == "step_00000001\n"
    record = (save_dir / "step_00000001" / "checkpoint.json").read_bytes()

    rollback = [*arguments, "faults.on_bad_steps=rollback", f"checkpoint.save_dir={save_dir}"]
    again = illada("train", *rollback, "checkpoint.interval_steps=1", "faults.max_rollbacks=2")
    assert again.code == 3
    assert again.out.count("rolled back from step 3 to") == 2
    assert "samples 4 to 19 are passed over" in again.out
    assert "after 2 returns to" in again.err
    assert (save_dir / "step_00000001" / "checkpoint.json").read_bytes() == record

    nothing = illada("train", *arguments, "faults.on_bad_steps=rollback", f"checkpoint.save_dir={tmp_path / 'new'}")
    assert nothing.code == 3
    assert "there is no checkpoint of this run to roll back to" in nothing.err
    unsaved = illada("train", *arguments, "faults.on_bad_steps=rollback")
    assert unsaved.code == 2
    assert "faults.on_bad_steps rollback needs a checkpoint" in unsaved.err


def _bad(step: int) -> BadStep:
    return BadStep(step, 8 * step - 8, 8 * step, math.nan, math.inf)


def test_what_is_passed_over_and_how_often() -> None:
    """The margin ends at the checkpoint; ranges of earlier returns stay; a newer checkpoint begins a new count."""
    config = FaultsConfig(max_bad_steps=2, rollback_margin_steps=3, max_rollbacks=2)
    before = BadSteps(config)
    before.observe(_bad(11))
    assert not before.too_many
    before.observe(None)
    for expected, (steps, checkpoint) in {
        (56, 96): ((11, 12), 5),  # three steps before step 11
        (96, 112): ((13, 14), 5),
        (144, 176): ((21, 22), 18),  # the checkpoint of step 18 has consumed 144
    }.items():
        for step in steps:
            before.observe(_bad(step))
        assert before.too_many
        assert before.may_roll_back(checkpoint)
        restored = BadSteps(config)
        restored.load_state_dict({})
        assert restored.roll_back(before, checkpoint, max(8 * checkpoint, expected[0]), 8) == expected
        before = restored
        assert not before.streak
    assert before.skipped_samples == [(56, 112), (144, 176)]
    assert before.count == 7
    before.observe(_bad(30))
    saved = json.loads(json.dumps(before.state_dict(), allow_nan=False))
    again = BadSteps(config)
    again.load_state_dict(saved)
    assert again.skipped_samples == before.skipped_samples
    assert [(one.step, one.first_sample, one.end_sample) for one in again.streak] == [(30, 232, 240)]
    assert math.isnan(again.streak[0].loss)
    assert again.state_dict() == before.state_dict()


def test_returns_to_one_checkpoint_are_counted() -> None:
    steps = BadSteps(FaultsConfig(max_bad_steps=1, max_rollbacks=2))
    for _ in range(2):
        assert steps.may_roll_back(5)
        steps.observe(_bad(9))
        restored = BadSteps(FaultsConfig(max_bad_steps=1, max_rollbacks=2))
        restored.roll_back(steps, 5, 40, 8)
        steps = restored
    assert not steps.may_roll_back(5)
    assert steps.may_roll_back(6)


def test_batches_behind_what_is_passed_over() -> None:
    """Runs of samples, none of them passed over, none twice; at the end as many as training.train_steps says."""
    config = load_config(None, ["training.global_batch_size=8", "training.rampup_batch_size=[4,2,24]"])
    skipped = [(12, 20), (30, 37), (37, 41)]

    def batches() -> Iterator[tuple[int, int]]:
        consumed = 0
        while True:
            first, size = next_batch(config.training, consumed, skipped)
            yield first, size
            consumed = first + size

    taken: list[int] = []
    for (first, size), _ in zip(batches(), range(12), strict=False):
        assert size == global_batch_size(config.training, first)
        taken += range(first, first + size)
    assert len(set(taken)) == len(taken)
    assert not set(taken) & {*range(12, 20), *range(30, 41)}
    assert taken[:14] == [*range(12), 20, 21]
    flat = load_config(None, ["training.global_batch_size=8", "training.train_steps=10"])
    assert samples_of_run(flat.training, 2, 16, [(0, 8), (24, 40)]) == 16 + 8 * 8 + 16

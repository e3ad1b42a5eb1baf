"""Whether a loss has become flat: on curves as a long run may have them, under several seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
from launch import Illada, read_steps

from benchmarks.schedule.loss_curves import FLAT, Case, cases, noisy
from benchmarks.schedule.plateau import new_rule, old_rule, scale
from illada_megatron.config import RunConfig, load_config
from illada_megatron.training.plateau import Plateau, PlateauDetector, slope_interval
from illada_megatron.training.schedule import LearningRate

STEPS, SEEDS = 10_000, range(3)
NOISE = 0.054  # of a step of 1280 sequences, see benchmarks/schedule/plateau.py
CASES = {case.name: case for case in cases(STEPS)}


def _losses(case: Case, seed: int, noise: float = NOISE) -> np.ndarray:
    return noisy(case.curve, noise * scale(case), seed)


@pytest.mark.parametrize("name", [name for name in CASES if name != "plateau"])
def test_a_loss_that_still_falls_is_not_flat(name: str) -> None:
    """A power law, also with a change of the mixture (declared or not) or a spike; the rule before began to decay."""
    case = CASES[name]
    for seed in SEEDS:
        losses = _losses(case, seed)
        assert new_rule(case, losses) is None, seed
        assert old_rule(case, losses) is not None


def test_a_plateau_is_found_soon() -> None:
    case = CASES["plateau"]
    for seed in SEEDS:
        found = new_rule(case, _losses(case, seed))
        assert found is not None, seed
        assert FLAT < found / STEPS < 1.6 * FLAT, seed


def test_noise_that_hides_the_slope_decides_nothing() -> None:
    """That of the demo's steps; the rule before begins to decay at the first window that chance makes worse."""
    case = CASES["power law"]
    for seed in SEEDS:
        losses = _losses(case, seed, noise=0.48)
        assert new_rule(case, losses) is None, seed
        assert old_rule(case, losses) is not None


def _config(*overrides: str) -> RunConfig:
    own = ["training.train_steps=4000", "data.sequence_length=64", "schedule.warmup_steps=10"]
    return load_config("tiny", [*own, "schedule.decay_steps=100", *overrides])


def _flat_losses(seed: int = 0, steps: int = 4000) -> list[float]:
    return (2.0 + 0.0005 * np.random.default_rng(seed).standard_normal(steps)).tolist()


def _told(rate: LearningRate, losses: list[float], first_step: int = 0) -> list[tuple[int, Plateau]]:
    size, found = rate.config.training.global_batch_size, []
    for step, loss in enumerate(losses[first_step:], first_step):
        if (plateau := rate.observe(step, step * size, loss)) is not None:
            found.append((step, plateau))
    return found


def test_it_is_announced_once_and_changes_no_rate_unless_asked() -> None:
    rate = LearningRate(_config("schedule.decay_start=never"))
    ((step, plateau),) = _told(rate, _flat_losses())
    assert 400 <= step < 600  # a tenth of the run, and a block's end
    assert not plateau.decays
    assert rate.decay_start_step is None
    text = plateau.text(rate.plateau.limit)
    assert "the loss is flat" in text
    assert "schedule.decay_start=now" in text


def test_asked_for_the_decay_begins_with_the_next_step() -> None:
    rate = LearningRate(_config("schedule.decay_start=plateau"))
    ((step, plateau),) = _told(rate, _flat_losses())
    assert plateau.decays
    assert rate.decay_start_step == step + 1
    size = rate.config.training.global_batch_size
    assert rate.at(step, step * size) == 1e-3 > rate.at(step + 1, (step + 1) * size)


def test_asked_for_after_it_was_announced_it_begins_all_the_same() -> None:
    never = LearningRate(_config("schedule.decay_start=never"))
    assert len(_told(never, _flat_losses(steps=1000))) == 1
    rate = LearningRate(_config("schedule.decay_start=plateau"))
    rate.load_state_dict(json.loads(json.dumps(never.state_dict())))
    ((step, plateau),) = _told(rate, _flat_losses(), 1000)
    assert 1000 <= step < 1030  # the next block's end
    assert plateau.decays


def test_not_before_the_least_number_of_tokens() -> None:
    tokens = 2000 * 16 * 64
    rate = LearningRate(_config("schedule.decay_start=never", f"schedule.plateau_min_tokens={tokens}"))
    ((step, _),) = _told(rate, _flat_losses())
    assert 2000 <= step < 2050


@pytest.mark.parametrize("restart_at", [30, 437, 438, 439, 440, 441, 442, 443, 444, 445, 500, 2000])
def test_the_same_is_found_after_a_restart(restart_at: int) -> None:
    """Wherever in a block the run was interrupted."""
    losses = _flat_losses()
    unbroken = _told(LearningRate(_config("schedule.decay_start=plateau")), losses)
    before, after = (LearningRate(_config("schedule.decay_start=plateau")) for _ in range(2))
    found = _told(before, losses[:restart_at])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    after.begin(restart_at, restart_at * 16)
    assert found + _told(after, losses, restart_at) == unbroken
    assert len(unbroken) == 1


BLEND = "data.blend=[{name: web, paths: [a]}, {name: math, paths: [b]}]"


@pytest.mark.parametrize(
    "overrides",
    [
        (BLEND, f"data.phases=[{{from_tokens: {1000 * 16 * 64}, weights: {{math: 1.0}}}}]"),
        (f"schedule.changes=[{{from_tokens: {1000 * 16 * 64}, lr: 5e-4}}]",),
        ("schedule.changes=[{from_step: 1000, lr: 5e-4}]",),
    ],
    ids=["phase of the blend", "rate by tokens", "rate by steps"],
)
def test_it_begins_anew_where_something_else_moves_the_loss(overrides: tuple[str, ...]) -> None:
    """Sixteen blocks of losses under the new conditions, a sixth of the tokens so far, before it is told again."""
    rate = LearningRate(_config("schedule.decay_start=never", *overrides))
    (first, _), (second, plateau) = _told(rate, _flat_losses())
    assert first < 1000
    assert 1150 <= second < 1250
    assert plateau.from_tokens >= 1000 * 16 * 64


def test_it_begins_anew_at_every_size_of_a_ramp_up() -> None:
    config = _config("training.rampup_batch_size=[4,4,24_000]", "schedule.plateau_min_tokens=0")
    detector, lr = PlateauDetector(config), config.training.lr
    for size in (4, 8, 16):
        detector.observe(lr, 50_000, size, 2.0)
        state = detector.state_dict()
        assert state["blocks"] == []
        assert state["block"][3] == 1
    detector.observe(lr, 50_000, 16, 2.0)
    assert detector.state_dict()["block"][3] == 2


def test_state_is_small_however_long_the_run() -> None:
    rate = LearningRate(_config("schedule.decay_start=never"))
    _told(rate, _flat_losses())
    assert len(json.dumps(rate.state_dict())) < 5000
    assert len(rate.state_dict()["plateau"]["blocks"]) == 64


def test_interval_holds_the_slope_as_often_as_it_says() -> None:
    """Noise with a tail so heavy that it has no variance (Student's t, 2 degrees of freedom)."""
    generator, places = np.random.default_rng(5), np.arange(16) / 64
    misses = 0
    for _ in range(2000):
        losses = 3.0 - 0.5 * places + 0.01 * generator.standard_t(2, len(places))
        slope, low, high = slope_interval(list(zip(places.tolist(), losses.tolist(), strict=True)))
        assert low <= slope <= high
        misses += not low <= -0.5 <= high
    assert misses < 0.015 * 2000


def test_a_quarter_of_wrong_blocks_does_not_move_the_slope() -> None:
    places = np.arange(16) / 64
    losses = 3.0 - 0.5 * places
    losses[[3, 4, 5, 12]] += 5.0  # a spike
    slope, _, _ = slope_interval(list(zip(places.tolist(), losses.tolist(), strict=True)))
    assert slope == pytest.approx(-0.5)


def test_neighbours_that_are_alike_widen_the_interval() -> None:
    generator, places = np.random.default_rng(2), np.arange(32) / 64
    white = 0.01 * generator.standard_normal(32)
    slow = np.convolve(0.01 * generator.standard_normal(40), np.ones(8) / np.sqrt(8.0))[7:39]

    def width(noise: np.ndarray) -> float:
        _, low, high = slope_interval(list(zip(places.tolist(), (2.0 + noise).tolist(), strict=True)))
        return high - low

    assert width(slow) > 2 * width(white)


@pytest.mark.parametrize("asked", ["never", "plateau"])
def test_a_run_tells_and_obeys(asked: str, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """A limit so wide that anything is flat: after sixteen blocks, here of a step each; also through a restart."""
    jsonl, board = tmp_path / "steps.jsonl", tmp_path / "board"
    arguments = [*tiny_run, f"logging.jsonl_path={jsonl}", f"logging.tensorboard_dir={board}"]
    arguments += [f"checkpoint.save_dir={tmp_path / 'checkpoints'}", "training.train_steps=22", "training.lr=1e-3"]
    arguments += ["schedule.plateau_nats_per_doubling=1e6", "schedule.plateau_min_tokens=0", "schedule.decay_steps=2"]
    outcomes = [
        illada("train", *arguments, f"schedule.decay_start={asked}", f"training.exit_steps={n}") for n in (9, 22)
    ]
    assert [one.code for one in outcomes] == [0, 0], outcomes[-1].err
    steps = read_steps(jsonl)
    told = [step["step"] for step in steps if step["plateau"] is not None]
    assert told == [17]
    assert steps[16]["plateau"]["decays"] == (asked == "plateau")
    rates = [step["lr"] for step in steps[16:]]
    assert rates == pytest.approx([1e-3, 5e-4, 0, 0, 0, 0] if asked == "plateau" else [1e-3] * 6)
    first, second = ("".join(one.out.split()) for one in outcomes)
    begun = "thedecaybegins" if asked == "plateau" else "itisannounced"
    assert begun + "wherethelosswouldchangebylessthan" in first.replace("│", "")
    assert "step17thelossisflat" in second
    assert b"the loss is flat" in b"".join(path.read_bytes() for path in board.iterdir())

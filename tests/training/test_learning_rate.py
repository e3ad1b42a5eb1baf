"""The learning rate's four phases, and a decay whose beginning is decided while training."""

import json
import math
from itertools import pairwise

import pytest

from illada_megatron.config import RunConfig, load_config
from illada_megatron.training.schedule import LearningRate, global_batch_size


def _config(**fields: object) -> RunConfig:
    schedule = {"warmup_steps": 10, "min_lr": 0.1, **fields}
    return load_config({"training": {"lr": 1.0, "train_steps": 100}, "schedule": schedule})


def _rate(**fields: object) -> LearningRate:
    config = _config(**fields)
    return LearningRate(config.schedule, config.training)


def _restarted(before: LearningRate, **fields: object) -> LearningRate:
    """What goes on from a checkpoint of `before`, under a configuration of `fields`."""
    after = _rate(**fields)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    return after


def test_warm_up_then_constant_then_minimum() -> None:
    rate = _rate(decay_start=60)
    assert [rate.at(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert {rate.at(step) for step in range(10, 60)} == {1.0}
    assert rate.at(59) > rate.at(60) > rate.at(98) > rate.at(99)
    assert rate.at(99) == pytest.approx(0.1)  # the last step
    assert rate.at(150) == pytest.approx(0.1)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert _rate(warmup_steps=0, decay_start="never").at(0) == 1.0


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_shape_of_the_decay(style: str) -> None:
    rate = _rate(decay_start=60, decay_steps=20, decay_style=style)
    for step in range(60, 80):
        progress = (step - 59) / 20
        left = 1 - progress if style == "linear" else (1 + math.cos(math.pi * progress)) / 2
        assert rate.at(step) == pytest.approx(0.1 + 0.9 * left), step
    assert rate.at(69) == pytest.approx(0.55)  # half way in both
    assert rate.at(80) == rate.at(99) == pytest.approx(0.1)


def test_step_and_fraction_say_the_same_start() -> None:
    by_step, by_fraction = _rate(decay_start=60), _rate(decay_start=0.6)
    assert [by_step.at(step) for step in range(100)] == [by_fraction.at(step) for step in range(100)]
    assert _rate(decay_start=1).decay_start_step == 1
    assert _rate(decay_start=1.0).decay_start_step == 100


def test_decay_cannot_begin_before_the_warm_up_ends() -> None:
    rate = _rate(decay_start=0)
    assert rate.at(9) == 1.0
    assert rate.at(10) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 90)) / 2)
    assert rate.at(99) == pytest.approx(0.1)


def test_never_stays_at_the_peak() -> None:
    rate = _rate(decay_start="never")
    rate.begin(50)
    assert {rate.at(step) for step in range(10, 1000)} == {1.0}


def test_never_then_now_decays_from_the_restart_and_keeps_its_start() -> None:
    """The authors' way: constant until someone looks at the loss, then restart with "now"."""
    never = _rate(decay_start="never")
    never.begin(0)
    now = _restarted(never, decay_start="now")
    now.begin(50)
    assert now.decay_start_step == 50
    assert now.at(49) == 1.0 > now.at(50)
    expected = [_rate(decay_start=50).at(step) for step in range(100)]
    assert [now.at(step) for step in range(100)] == expected
    again = _restarted(now, decay_start="now")  # a crash at step 70
    again.begin(70)
    assert [again.at(step) for step in range(100)] == expected


def test_configuration_takes_the_decay_back() -> None:
    now = _rate(decay_start="now")
    now.begin(50)
    assert _restarted(now, decay_start="never").at(60) == 1.0
    assert _restarted(now, decay_start=80).decay_start_step == 80


def _loss(step: int) -> float:
    """Falls as e^-x and flattens: less than 1% a window of 10 from about step 56 on."""
    return 2.0 + math.exp(-step / 12)


def test_plateau_starts_the_decay_where_the_curve_flattens() -> None:
    settings = {"decay_start": "plateau", "plateau_window_steps": 10, "plateau_min_improvement": 0.01}
    rate = _rate(**settings)
    started = [step for step in range(100) if rate.observe(step, _loss(step))]
    # the first pair of windows after the warm-up whose means differ by less than 1%
    means = {end: sum(_loss(step) for step in range(end - 10, end)) / 10 for end in range(20, 101, 10)}
    flat = next(end for before, end in pairwise(means) if means[end] >= 0.99 * means[before])
    assert 30 < flat < 90
    assert started == [flat - 1]
    assert rate.decay_start_step == flat
    assert rate.at(flat - 1) == 1.0 > rate.at(flat)


def test_plateau_ignores_a_single_bad_step_and_the_warm_up() -> None:
    settings = {"decay_start": "plateau", "plateau_window_steps": 10, "plateau_min_improvement": 0.01}
    rate = _rate(**settings)
    assert not any(rate.observe(step, 5.0) for step in range(10))
    assert not any(rate.observe(step, 9.0 - 0.05 * step + (2.0 if step == 33 else 0.0)) for step in range(10, 100))


@pytest.mark.parametrize("restart_at", [12, 25, 30, 47, 59, 75])
def test_plateau_goes_on_after_a_restart(restart_at: int) -> None:
    """The same decision at the same step, wherever in a window the run was interrupted."""
    settings = {"decay_start": "plateau", "plateau_window_steps": 10, "plateau_min_improvement": 0.01}
    unbroken, rate = _rate(**settings), _rate(**settings)
    for step in range(100):
        if step == restart_at:
            rate = _restarted(rate, **settings)
            rate.begin(step)
        assert rate.observe(step, _loss(step)) == unbroken.observe(step, _loss(step)), step
    assert rate.decay_start_step == unbroken.decay_start_step is not None


def test_rising_loss_is_a_plateau_too() -> None:
    rate = _rate(decay_start="plateau", plateau_window_steps=5, warmup_steps=0)
    assert [step for step in range(20) if rate.observe(step, 2.0 + step)] == [9]


def test_ramp_up_gives_every_size_as_many_samples() -> None:
    config = load_config({"training": {"global_batch_size": 32, "rampup_batch_size": (8, 8, 300)}})
    consumed, sizes = 0, []
    while consumed < 600:
        sizes.append(global_batch_size(config.training, consumed))
        consumed += sizes[-1]
    assert sizes == sorted(sizes)
    assert sizes[0] == 8
    assert sizes[-1] == 32
    for size in (8, 16, 24):  # 100 samples each, up to a batch
        assert abs(sizes.count(size) * size - 100) <= 24
    assert sizes.count(32) * 32 >= 288


def test_ramp_up_of_the_final_size_is_none() -> None:
    config = load_config({"training": {"global_batch_size": 8, "rampup_batch_size": (8, 4, 100)}})
    assert global_batch_size(config.training, 0) == 8
    assert global_batch_size(load_config({"training": {"global_batch_size": 8}}).training, 0) == 8

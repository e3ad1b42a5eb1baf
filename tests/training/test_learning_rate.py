"""The learning rate: warm-up, what papers planned, a decay whose beginning is decided while training."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest

from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.config.learning_rate import samples_after, schedule_rows, steps_before
from illada_megatron.training.schedule import LearningRate, global_batch_size, next_batch


def _config(**fields: object) -> RunConfig:
    schedule = {"warmup_steps": 10, "min_lr": 0.1, **fields}
    return load_config({"training": {"lr": 1.0, "train_steps": 100}, "schedule": schedule})


def _rate(**fields: object) -> LearningRate:
    return LearningRate(_config(**fields))


def _at(rate: LearningRate, step: int) -> float:
    """Of a run that has passed over no samples."""
    return rate.at(step, samples_after(rate.config.training, step))


def _restarted(before: LearningRate, **fields: object) -> LearningRate:
    """What goes on from a checkpoint of `before`, under a configuration of `fields`."""
    after = _rate(**fields)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    return after


def test_warm_up_then_constant_then_minimum() -> None:
    rate = _rate(decay_start=60)
    assert [_at(rate, step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert {_at(rate, step) for step in range(10, 60)} == {1.0}
    assert _at(rate, 59) > _at(rate, 60) > _at(rate, 98) > _at(rate, 99)
    assert _at(rate, 99) == pytest.approx(0.1)  # the last step
    assert _at(rate, 150) == pytest.approx(0.1)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert _at(_rate(warmup_steps=0, decay_start="never"), 0) == 1.0


@pytest.mark.parametrize("style", ["linear", "cosine", "minus_sqrt"])
def test_shape_of_the_decay(style: str) -> None:
    rate = _rate(decay_start=60, decay_steps=20, decay_style=style)
    for step in range(60, 80):
        progress = (step - 59) / 20
        lefts = {
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "minus_sqrt": 1 - math.sqrt(progress),
        }
        left = lefts[style]
        assert _at(rate, step) == pytest.approx(0.1 + 0.9 * left), step
    half = 1 - math.sqrt(0.5) if style == "minus_sqrt" else 0.5
    assert _at(rate, 69) == pytest.approx(0.1 + 0.9 * half)
    assert _at(rate, 80) == _at(rate, 99) == pytest.approx(0.1)


def test_step_and_fraction_say_the_same_start() -> None:
    by_step, by_fraction = _rate(decay_start=60), _rate(decay_start=0.6)
    assert [_at(by_step, step) for step in range(100)] == [_at(by_fraction, step) for step in range(100)]
    assert _rate(decay_start=1).decay_start_step == 1
    assert _rate(decay_start=1.0).decay_start_step == 100


def test_decay_cannot_begin_before_the_warm_up_ends() -> None:
    rate = _rate(decay_start=0)
    assert _at(rate, 9) == 1.0
    assert _at(rate, 10) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 90)) / 2)
    assert _at(rate, 99) == pytest.approx(0.1)


def test_never_stays_at_the_peak() -> None:
    rate = _rate(decay_start="never")
    rate.begin(50, 8 * 50)
    assert {_at(rate, step) for step in range(10, 1000)} == {1.0}


def test_never_then_now_decays_from_the_restart_and_keeps_its_start() -> None:
    """The authors' way: constant until someone looks at the loss, then restart with "now"."""
    never = _rate(decay_start="never")
    never.begin(0, 0)
    now = _restarted(never, decay_start="now")
    now.begin(50, 8 * 50)
    assert now.decay_start_step == 50
    assert _at(now, 49) == 1.0 > _at(now, 50)
    expected = [_at(_rate(decay_start=50), step) for step in range(100)]
    assert [_at(now, step) for step in range(100)] == expected
    again = _restarted(now, decay_start="now")  # a crash at step 70
    again.begin(70, 8 * 70)
    assert [_at(again, step) for step in range(100)] == expected


def test_configuration_takes_the_decay_back() -> None:
    now = _rate(decay_start="now")
    now.begin(50, 8 * 50)
    assert _at(_restarted(now, decay_start="never"), 60) == 1.0
    assert _restarted(now, decay_start=80).decay_start_step == 80


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


LLADA_POINTS = [  # step (0 is the first), rate; a step is 1280 * 4096 tokens: 1.2T are 228,881.8 steps, 2.0T 381,469.7
    (0, 4e-4 / 2000),
    (999, 2e-4),
    (1999, 4e-4),
    (2000, 4e-4),
    (228_881, 4e-4),
    (228_882, 1e-4),
    (381_469, 1e-4),
    (400_000, 1e-4 - 9e-5 * (400_001 * 5_242_880 - 2e12) / 0.3e12),
    (410_080, 5.5e-5),
    (438_689, 1e-5),
]
ILLADA_POINTS = [(0, 1e-7), (999, 1e-4), (1999, 2e-4), (2000, 2e-4), (11_499, 2e-4), (100_000, 2e-4), (572_205, 2e-4)]
ILLADA_POINTS += [(900_000, 2e-4), (1_144_409, 2e-4), (2_000_000, 2e-4)]


@pytest.mark.parametrize(
    ("preset", "points"),
    [("llada-8b", LLADA_POINTS), ("illada-8b", ILLADA_POINTS), ("illada-70b", ILLADA_POINTS)],
)
def test_presets_have_the_papers_rates(preset: str, points: list[tuple[int, float]]) -> None:
    """arXiv 2502.09992, section 3.2, and 2606.25331: without someone's word iLLaDA's rate stays where it is."""
    rate = LearningRate(load_config(preset))
    rate.begin(0, 0)
    assert len(points) == 10
    for step, expected in points:
        assert _at(rate, step) == pytest.approx(expected, rel=1e-4), step


def test_illada_decays_when_told_as_the_paper_says() -> None:
    config = load_config("illada-8b", ["schedule.decay_start=now", "schedule.decay_steps=100_000"])
    rate = LearningRate(config)
    rate.begin(1_000_000, 1_280_000_000)
    points = {999_999: 2e-4, 1_024_999: 5e-6 + 1.95e-4 * (1 + math.cos(math.pi / 4)) / 2, 1_049_999: 1.025e-4}
    for step, expected in (points | {1_099_999: 5e-6, 1_144_409: 5e-6}).items():
        assert _at(rate, step) == pytest.approx(expected), step


BY_TOKENS = {"changes": [{"from_tokens": 3000, "lr": 0.5}, {"from_tokens": 6000, "lr": 0.1, "shape": "minus_sqrt"}]}


def _by_tokens(**training: Any) -> LearningRate:
    training = {"lr": 1.0, "train_steps": 100, "global_batch_size": 8, **training}
    values = {"training": training, "data": {"sequence_length": 10}, "schedule": {"warmup_steps": 2, **BY_TOKENS}}
    return LearningRate(load_config(values))


def test_changes_by_tokens_follow_the_samples_through_a_ramp_up() -> None:
    """Whatever the batches were on the way, what has been consumed says the rate."""
    rate = _by_tokens(rampup_batch_size=(2, 2, 300), train_steps=200)
    training = rate.config.training
    consumed, rates = 0, []
    for step in range(200):
        rates.append((10 * consumed, rate.at(step, consumed)))
        consumed += global_batch_size(training, consumed)
    end, tokens = 10 * consumed, [begin for begin, _ in rates]
    assert len({after - before for before, after in pairwise(tokens)}) == 4  # all of the ramp-up
    for (begin, found), following in zip(rates[2:], [*tokens[3:], end], strict=True):
        progress = (following - 6000) / (end - 6000)
        expected = 1.0 if begin < 3000 else 0.5 if begin < 6000 else 0.1 + 0.4 * (1 - math.sqrt(progress))
        assert found == pytest.approx(expected), begin
    assert rates[-1][1] == pytest.approx(0.1)


def test_samples_that_are_passed_over_count_for_changes() -> None:
    """As they do for data.phases: the place in the order of the samples says it."""
    rate, skipped = _by_tokens(), [(100, 296)]
    consumed, rates = 0, {}
    for step in range(60):
        first, size = next_batch(rate.config.training, consumed, skipped)
        rates[first] = rate.at(step, first)
        consumed = first + size
    for first, found in rates.items():
        if first >= 16:
            assert found == _at(rate, first // 8), first
    assert rates[296] == 1.0
    assert rates[304] == 0.5
    assert 100 not in rates


def test_changes_by_steps_and_the_shape_of_each() -> None:
    changes = [{"from_step": 20, "lr": 0.4, "shape": "linear"}, {"from_step": 60, "lr": 0.2, "shape": "cosine"}]
    rate = _rate(changes=[*changes, {"from_step": 80, "lr": 0.3}])
    assert rate.decay_start_step is None  # they say it all
    assert [_at(rate, step) for step in (9, 19, 39, 59, 69, 79, 80, 200)] == pytest.approx(
        [1.0, 1.0, 0.7, 0.4, 0.3, 0.2, 0.3, 0.3]
    )


def test_decay_now_begins_with_the_rate_that_is_planned_there_also_after_a_restart() -> None:
    """In the middle of a change by tokens; the decay's first rate needs the samples consumed then."""
    planned = _by_tokens()
    now = LearningRate(planned.config.model_copy(update={"schedule": _told(planned.config.schedule)}))
    now.begin(70, 560)
    before = planned.at(70, 560)
    assert now.at(69, 552) == planned.at(69, 552)
    assert now.at(74, 592) == pytest.approx(0.05 + (before - 0.05) / 2)
    again = LearningRate(now.config)
    again.load_state_dict(json.loads(json.dumps(now.state_dict())))
    again.begin(75, 600)
    assert [_at(again, step) for step in range(100)] == [_at(now, step) for step in range(100)]


def _told(schedule: Any) -> Any:
    return schedule.model_copy(
        update={"decay_start": "now", "decay_steps": 10, "min_lr": 0.05, "decay_style": "linear"}
    )


def test_a_checkpoint_of_before_says_as_much_as_it_knows() -> None:
    """Its open window belongs to another rule; the start of its decay stands."""
    window = {"window_sum": 12.5, "window_count": 4, "last_mean": 3.0}
    now = _rate(decay_start="now")
    now.load_state_dict({"decay_start": "now", "decay_start_step": 50, "plateau": window})
    now.begin(70, 560)
    assert now.decay_start_step == 50
    never = _rate(decay_start="never")
    never.load_state_dict({"decay_start": "never", "decay_start_step": None, "plateau": None})
    assert never.plateau.state_dict() == _rate(decay_start="never").plateau.state_dict()


def test_a_configuration_of_before_reads_where_it_says_the_same() -> None:
    old = {"plateau_window_steps": 500, "plateau_min_improvement": 0.002, "decay_start": 0.8, "warmup_steps": 100}
    assert load_config({"schedule": old}).schedule == load_config({"schedule": {"decay_start": 0.8}}).schedule
    own = {**old, "plateau_window_steps": 50}
    assert load_config({"schedule": {**own, "decay_start": "never"}}).schedule.decay_start == "never"
    with pytest.raises(ConfigError, match=r"plateau_window_steps 50 .* leave it out and set plateau_nats_per_doubling"):
        load_config({"schedule": {**own, "decay_start": "plateau"}})
    assert load_config({"schedule": {**own, "decay_start": "plateau"}}, ["schedule.decay_start=never"])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"changes": [{"lr": 0.5}]}, "from_tokens None and from_step None: give one"),
        ({"changes": [{"from_step": 5, "lr": 0.5}, {"from_step": 5, "lr": 0.4}]}, "expected ascending numbers"),
        ({"changes": [{"from_step": 5, "lr": 0.5}, {"from_tokens": 9, "lr": 0.4}]}, "by tokens, or all by steps"),
        ({"changes": [{"from_step": 5, "lr": 0.5}], "decay_start": 0.8}, "leave decay_start out"),
        ({"changes": [{"from_step": 5, "lr": 0.05}]}, "schedule.min_lr 0.1 is above schedule.changes 0.05"),
    ],
)
def test_changes_that_contradict_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _config(**fields)


def test_table_of_the_schedule() -> None:
    def rows(preset: str, *overrides: str, decay_start: int | None = None) -> list[str]:
        ((_, text),) = schedule_rows(load_config(preset, overrides), decay_start)
        return [" ".join(line.split()) for line in text.split("\n")]

    assert rows("llada-8b") == [
        "until step 2,000, 10.5B tokens: warm-up from 0 to 0.0004, linear",
        "until step 228,882, 1.20T tokens: 0.0004",
        "until step 381,470, 2.00T tokens: 0.0001",
        "until step 438,690, 2.30T tokens: to 1e-05, linear",
        "no decay beside schedule.changes",
    ]
    assert rows("tiny")[1:] == [
        "until step 800, 3.28M tokens: 0.001",
        "until step 1,000, 4.10M tokens: to 0, cosine",
    ]
    assert "it never falls (schedule.decay_start=never): to begin a decay, stop the run" in rows("illada-8b")[-1]
    begun = rows("illada-8b", "schedule.decay_start=now", "schedule.decay_steps=1000", decay_start=900_000)
    assert begun[1:] == [
        "until step 900,000, 9.44T tokens: 0.0002",
        "until step 901,000, 9.45T tokens: to 5e-06, cosine",
        "until step 1,144,410, 12.0T tokens: 5e-06",
    ]


def test_steps_and_samples_of_a_ramp_up_fit_each_other() -> None:
    training = _by_tokens(rampup_batch_size=(2, 2, 300)).config.training
    for step in range(200):
        assert steps_before(training, samples_after(training, step)) == step
        assert steps_before(training, samples_after(training, step) + 1) == step + 1

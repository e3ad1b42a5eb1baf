"""Batch sizes and learning rates as far as the configuration alone says them: functions of a step and of the samples
consumed before it, and so the same in every layout and after every restart."""

import math
from bisect import bisect_right

from illada_megatron.config.layout import RunConfig
from illada_megatron.config.schema import ScheduleConfig, Shape, TrainingConfig


def global_batch_size(training: TrainingConfig, consumed_samples: int) -> int:
    """Samples of the step that starts at `consumed_samples` (Megatron's ramp-up: as many samples at each size)."""
    if training.rampup_batch_size is None:
        return training.global_batch_size
    start, increment, samples = training.rampup_batch_size
    increments = (training.global_batch_size - start) // increment
    if increments == 0 or consumed_samples >= samples:
        return training.global_batch_size
    return start + int(consumed_samples * increments / samples) * increment


def samples_after(training: TrainingConfig, steps: int, consumed_samples: int = 0) -> int:
    """Samples consumed `steps` steps after `consumed_samples`, where none are passed over."""
    for step in range(steps):
        size = global_batch_size(training, consumed_samples)
        if size == training.global_batch_size:  # no more of the ramp-up: the rest is a product
            return consumed_samples + size * (steps - step)
        consumed_samples += size
    return consumed_samples


def steps_before(training: TrainingConfig, samples: int) -> int:
    """Steps that begin before a run's sample `samples`, where none are passed over."""
    step, consumed_samples = 0, 0
    while consumed_samples < samples:
        size = global_batch_size(training, consumed_samples)
        if size == training.global_batch_size:
            return step - (consumed_samples - samples) // size
        step, consumed_samples = step + 1, consumed_samples + size
    return step


def between(start: float, end: float, shape: Shape, progress: float) -> float:
    """The rate on the way from `start` to `end`; progress: the part of the way that is done, 0 to 1.

    Of start - end is left 1 - x (linear), (1 + cos(pi x)) / 2 (cosine), 1 - sqrt(x) (minus_sqrt, arXiv 2405.18392).
    """
    progress = min(1.0, progress)
    if shape == "linear":
        left = 1.0 - progress
    elif shape == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = 1.0 - math.sqrt(progress)
    return end + (start - end) * left


def planned_decay(schedule: ScheduleConfig, train_steps: int) -> int | None:
    """The step at which the decay begins, where the configuration says so; None: never, or not yet known."""
    start = schedule.decay_start
    if start is None and not schedule.changes:
        start = 0.8
    if isinstance(start, float):
        return round(start * train_steps)
    return start if isinstance(start, int) else None


class PlannedRates:
    """training.lr and schedule.changes, without warm-up and decay."""

    def __init__(self, config: RunConfig) -> None:
        training, changes = config.training, config.schedule.changes
        self._training = training
        self._rates = [training.lr, *(change.lr for change in changes)]
        self._shapes = [change.shape for change in changes]
        self._by_tokens = any(change.from_tokens is not None for change in changes)
        self._sequence_length = config.data.sequence_length
        run_end = training.train_steps
        if self._by_tokens:
            run_end = samples_after(training, training.train_steps) * self._sequence_length
        self._places = [change.from_tokens or change.from_step or 0 for change in changes] + [run_end]
        """Tokens or steps at which the changes begin, and at which the last one ends."""

    def at(self, step: int, first_sample: int) -> float:
        """The rate of step `step` (0 is the first), whose samples begin with `first_sample`: a change counts for the
        steps that begin at or after it; one that takes its time has come to its end with the last step before the
        next."""
        number = len(self._shapes)
        if number == 0:
            return self._rates[0]
        begin, end = step, step + 1
        if self._by_tokens:
            end_sample = first_sample + global_batch_size(self._training, first_sample)
            begin, end = first_sample * self._sequence_length, end_sample * self._sequence_length
        index = bisect_right(self._places, begin, hi=number) - 1
        if index < 0:
            return self._rates[0]
        shape, start, stop = self._shapes[index], self._places[index], self._places[index + 1]
        if shape == "constant" or stop <= start:
            return self._rates[index + 1]
        return between(self._rates[index], self._rates[index + 1], shape, (end - start) / (stop - start))


def schedule_rows(config: RunConfig, decay_start: int | None = None) -> list[tuple[str, str]]:
    """The schedule as rows of a table: steps (from 1) and tokens up to which each piece lasts, and its rates.

    decay_start: the step at which a decay that the configuration does not date has begun; None: it has not.
    """
    schedule, training = config.schedule, config.training
    planned = planned_decay(schedule, training.train_steps)
    decay = planned if decay_start is None else decay_start
    decay = decay if decay is None else max(decay, schedule.warmup_steps)
    pieces = _pieces(config, training.train_steps if decay is None else min(decay, training.train_steps))
    if decay is not None and decay < training.train_steps:
        end = training.train_steps if schedule.decay_steps is None else decay + schedule.decay_steps
        text = f"to {schedule.min_lr:g}, {schedule.decay_style}"
        if end > training.train_steps:
            text += f", which step {end:,} would reach"
        pieces.append((min(end, training.train_steps), text))
        if end < training.train_steps:
            pieces.append((training.train_steps, f"{schedule.min_lr:g}"))
    rows = []
    for step, text in pieces:
        tokens = samples_after(training, step) * config.data.sequence_length
        rows.append(f"until step {step:>9,}, {_short(tokens):>6} tokens: {text}")
    if decay is None:
        rows.append(_open_end(config))
    return [("learning rate", "\n".join(rows))]


def _pieces(config: RunConfig, end_step: int) -> list[tuple[int, str]]:
    """(step before which it ends, its rates) of warm-up, constant rate and changes, up to `end_step`."""
    schedule, training, length = config.schedule, config.training, config.data.sequence_length
    starts = [
        steps_before(training, -(-change.from_tokens // length))
        if change.from_tokens is not None
        else change.from_step or 0
        for change in schedule.changes
    ]
    pieces, warm_up = [], min(schedule.warmup_steps, end_step)
    if warm_up:
        pieces.append((warm_up, f"warm-up from 0 to {training.lr:g}, linear"))
    texts = [f"{training.lr:g}"]
    texts += [f"{one.lr:g}" if one.shape == "constant" else f"to {one.lr:g}, {one.shape}" for one in schedule.changes]
    begin = warm_up
    for stop, text in zip([*starts, end_step], texts, strict=True):
        if begin < min(stop, end_step):
            begin = min(stop, end_step)
            pieces.append((begin, text))
    return pieces


def _open_end(config: RunConfig) -> str:
    schedule = config.schedule
    length = f"{schedule.decay_steps:,} steps" if schedule.decay_steps else "the rest of the run"
    decay = f"{schedule.decay_style} to {schedule.min_lr:g} over {length}"
    if schedule.decay_start == "plateau":
        return f"when the loss is flat: {decay}"
    if schedule.decay_start == "now":
        return f"from where this run begins or goes on: {decay}"
    if schedule.changes:
        return "no decay beside schedule.changes"
    return (
        "it never falls (schedule.decay_start=never): to begin a decay, stop the run and continue it with "
        f"schedule.decay_start=now schedule.decay_steps=N, or =plateau: {schedule.decay_style} to {schedule.min_lr:g}"
    )


def _short(tokens: int) -> str:
    """Three digits: 1.20T."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens >= unit:
            return f"{tokens / unit:#.3g}{name}"
    return str(tokens)

"""What a step's learning rate and batch size are."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from illada_megatron.config import ScheduleConfig, TrainingConfig


def global_batch_size(training: TrainingConfig, consumed_samples: int) -> int:
    """Samples of the step that starts at `consumed_samples` (Megatron's ramp-up: as many samples at each size)."""
    if training.rampup_batch_size is None:
        return training.global_batch_size
    start, increment, samples = training.rampup_batch_size
    increments = (training.global_batch_size - start) // increment
    if increments == 0 or consumed_samples >= samples:
        return training.global_batch_size
    return start + int(consumed_samples * increments / samples) * increment


def next_batch(training: TrainingConfig, consumed_samples: int, skipped: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(first sample, number of samples) of the step that follows `consumed_samples`.

    skipped: ranges [first, end) that no step takes, ascending. A step that would touch one begins behind it: a batch is
    always a run of samples, and the same after a restart and in any layout.
    """
    for first, end in skipped:
        if consumed_samples < end and consumed_samples + global_batch_size(training, consumed_samples) > first:
            consumed_samples = end
    return consumed_samples, global_batch_size(training, consumed_samples)


def samples_of_run(
    training: TrainingConfig, step: int, consumed_samples: int, skipped: Sequence[tuple[int, int]] = ()
) -> int:
    """Samples consumed at training.train_steps by a run that has consumed `consumed_samples` at `step`; those that it
    is yet to pass over (`skipped`) count."""
    consumed_samples += sum(max(0, end - max(first, consumed_samples)) for first, end in skipped)
    while step < training.train_steps:
        size = global_batch_size(training, consumed_samples)
        if size == training.global_batch_size:  # no more of the ramp-up: the rest is a product
            return consumed_samples + size * (training.train_steps - step)
        step, consumed_samples = step + 1, consumed_samples + size
    return consumed_samples


@dataclass
class _Plateau:
    """Mean losses of two windows of steps that follow each other; filled as the steps come."""

    window_sum: float = 0.0
    window_count: int = 0
    last_mean: float | None = None


class LearningRate:
    """Linear warm-up, constant, cosine or linear decay. When the decay starts may be known only while training.

    Every rank keeps one and feeds it the same losses; its state goes into the checkpoint.
    """

    def __init__(self, config: ScheduleConfig, training: TrainingConfig) -> None:
        self.config = config
        self.peak = training.lr
        self.train_steps = training.train_steps
        self._plateau = _Plateau()
        self._decay_start: int | None = None
        start = self.config.decay_start
        if isinstance(start, float):
            self._decay_start = round(start * self.train_steps)
        elif isinstance(start, int):
            self._decay_start = start

    @property
    def decay_start_step(self) -> int | None:
        """None: not decided yet, or never."""
        return self._decay_start

    def at(self, step: int) -> float:
        """The rate of step `step` (0 is the first)."""
        if step < self.config.warmup_steps:
            return self.peak * (step + 1) / self.config.warmup_steps
        if self._decay_start is None or step < self._decay_start:
            return self.peak
        start = max(self._decay_start, self.config.warmup_steps)
        length = self.config.decay_steps or max(1, self.train_steps - start)
        progress = min(1.0, (step - start + 1) / length)
        left = 1.0 - progress if self.config.decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.config.min_lr + (self.peak - self.config.min_lr) * left

    def begin(self, step: int) -> None:
        """The run starts or goes on at `step`: "now" means this step, unless an earlier "now" was restored."""
        if self.config.decay_start == "now" and self._decay_start is None:
            self._decay_start = step

    def observe(self, step: int, loss: float) -> bool:
        """Take note of the loss of `step` (nats/token); True where it starts the decay ("plateau").

        Compares the mean of each window of `plateau_window_steps` with the one before: a single step's loss says
        little, its 1/p weights make it noisy.
        """
        if self.config.decay_start != "plateau" or self._decay_start is not None or step < self.config.warmup_steps:
            return False
        window = self._plateau
        window.window_sum += loss
        window.window_count += 1
        if window.window_count < self.config.plateau_window_steps:
            return False
        mean, last = window.window_sum / window.window_count, window.last_mean
        self._plateau = _Plateau(last_mean=mean)
        if last is None or mean < last * (1.0 - self.config.plateau_min_improvement):
            return False
        self._decay_start = step + 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """What cannot be told from the configuration."""
        return {
            "decay_start": self.config.decay_start,
            "decay_start_step": self._decay_start,
            "plateau": asdict(self._plateau),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was, as far as the configuration still asks for the same: a start given as a step, a
        fraction or "never" is the configuration's to say, also against the checkpoint."""
        if self.config.decay_start in ("now", "plateau") and state["decay_start"] == self.config.decay_start:
            self._decay_start = state["decay_start_step"]
            self._plateau = _Plateau(**state["plateau"])

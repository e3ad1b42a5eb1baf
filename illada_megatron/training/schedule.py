"""What a step's learning rate and batch size are."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from illada_megatron.config import RunConfig, TrainingConfig
from illada_megatron.config.learning_rate import (
    PlannedRates,
    between,
    global_batch_size,
    planned_decay,
    samples_after,
)
from illada_megatron.training.plateau import Plateau, PlateauDetector

__all__ = ["LearningRate", "global_batch_size", "next_batch", "samples_of_run"]


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
    passed_over = sum(max(0, end - max(first, consumed_samples)) for first, end in skipped)
    return samples_after(training, training.train_steps - step, consumed_samples + passed_over)


class LearningRate:
    """Linear warm-up, the rates that are planned, and a decay whose beginning may be known only while training.

    Every rank keeps one and feeds it the same losses; its state goes into the checkpoint.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.plateau = PlateauDetector(config)
        self._planned = PlannedRates(config)
        self._decay_start = planned_decay(config.schedule, config.training.train_steps)
        self._decay_sample = 0
        """Samples consumed where it was decided while training: the rate that the decay begins with."""

    @property
    def decay_start_step(self) -> int | None:
        """None: not decided yet, or never."""
        return self._decay_start

    def at(self, step: int, first_sample: int) -> float:
        """The rate of step `step` (0 is the first), whose samples begin with `first_sample`."""
        schedule, training = self.config.schedule, self.config.training
        if step < schedule.warmup_steps:
            return self._planned.at(step, first_sample) * (step + 1) / schedule.warmup_steps
        if self._decay_start is None or step < self._decay_start:
            return self._planned.at(step, first_sample)
        start = max(self._decay_start, schedule.warmup_steps)
        length = schedule.decay_steps or max(1, training.train_steps - start)
        begin = self._planned.at(start, self._decay_sample)
        return between(begin, schedule.min_lr, schedule.decay_style, (step - start + 1) / length)

    def begin(self, step: int, consumed_samples: int) -> None:
        """The run starts or goes on at `step`: "now" means this step, unless an earlier "now" was restored."""
        if self.config.schedule.decay_start == "now" and self._decay_start is None:
            self._decay_start, self._decay_sample = step, consumed_samples

    def observe(self, step: int, first_sample: int, loss: float) -> Plateau | None:
        """Take note of the loss (nats/token) of `step`, whose samples begin with `first_sample`. Returns what there is
        to tell: the loss has become flat, and with "plateau" the decay begins with the next step."""
        if self._decay_start is not None and step >= self._decay_start:
            return None
        batch_size = global_batch_size(self.config.training, first_sample)
        found, first = self.plateau.observe(self.at(step, first_sample), first_sample, batch_size, loss)
        if found is None:
            return None
        if self.config.schedule.decay_start == "plateau":
            self._decay_start, self._decay_sample = step + 1, first_sample + batch_size
            return replace(found, decays=True)
        return found if first else None

    def state_dict(self) -> dict[str, Any]:
        """What cannot be told from the configuration."""
        return {
            "decay_start": self.config.schedule.decay_start,
            "decay_start_step": self._decay_start,
            "decay_start_samples": self._decay_sample,
            "plateau": self.plateau.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was, as far as the configuration still asks for the same: a start given as a step, a
        fraction or "never" is the configuration's to say, also against the checkpoint."""
        self.plateau.load_state_dict(state.get("plateau"))
        decay_start = self.config.schedule.decay_start
        if decay_start in ("now", "plateau") and state.get("decay_start") == decay_start:
            self._decay_start = state["decay_start_step"]
            self._decay_sample = state.get("decay_start_samples", 0)  # before there were changes it meant nothing

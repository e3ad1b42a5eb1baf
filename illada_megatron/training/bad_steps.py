"""Steps whose loss or gradient norm is not finite: which there were, and which samples the run passes over since.

Such a step is skipped by all ranks: weights, moments and Adam's count of steps stay as they are, while the step and its
samples count as done, so that the learning rate, which follows steps, and the order of samples go on as planned. What
is kept here is the same on every rank and part of a checkpoint.
"""

from dataclasses import asdict, dataclass
from typing import Any

from illada_megatron.config.schema import FaultsConfig


@dataclass(frozen=True)
class BadStep:
    """A step that was skipped."""

    step: int
    """Steps done, this one included."""
    first_sample: int
    end_sample: int
    """Its samples are [first_sample, end_sample)."""
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Rollback:
    """A return to a checkpoint."""

    from_step: int
    to_step: int
    checkpoint: str
    first_sample: int
    end_sample: int
    """The samples [first_sample, end_sample) are passed over from now on."""
    bad_samples: tuple[tuple[int, int], ...]
    """Of them, the ranges [first, end) of the bad steps."""


class BadSteps:
    """The bad steps of a run."""

    def __init__(self, config: FaultsConfig) -> None:
        self._config = config
        self.streak: list[BadStep] = []
        """The bad steps since the last good one."""
        self.count = 0
        """All that were skipped."""
        self.skipped_samples: list[tuple[int, int]] = []
        """Ranges [first, end) that no step takes any more, ascending and apart."""
        self._rolled_back_to: int | None = None
        self._rollbacks = 0

    @property
    def too_many(self) -> bool:
        """Whether something has to happen."""
        return len(self.streak) >= self._config.max_bad_steps

    def observe(self, bad: BadStep | None) -> None:
        """Take note of a step; None: it was a good one."""
        if bad is None:
            self.streak = []
            return
        self.streak.append(bad)
        self.count += 1

    def may_roll_back(self, to_step: int) -> bool:
        """Whether another return to the checkpoint of `to_step` is allowed; a newer checkpoint begins a new count."""
        return self._rolled_back_to != to_step or self._rollbacks < self._config.max_rollbacks

    def roll_back(self, before: "BadSteps", to_step: int, consumed_samples: int, batch_size: int) -> tuple[int, int]:
        """This is what the checkpoint of `to_step` says, which has consumed `consumed_samples`; `before` is what the
        run knew when it had to go back. The samples of its streak, and of rollback_margin_steps steps of batch_size
        before it as far as they follow the checkpoint, are passed over from now on: [first, end) is returned."""
        margin = self._config.rollback_margin_steps * batch_size
        first = max(consumed_samples, before.streak[0].first_sample - margin)
        end = before.streak[-1].end_sample
        self.skipped_samples = _merged([*self.skipped_samples, *before.skipped_samples, (first, end)])
        self.count, self.streak = before.count, []
        self._rollbacks = before._rollbacks + 1 if before._rolled_back_to == to_step else 1
        self._rolled_back_to = to_step
        return first, end

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "skipped_samples": self.skipped_samples,
            "skipped_steps": self.count,
            # not finite numbers are not JSON
            "streak": [{**asdict(one), "loss": str(one.loss), "grad_norm": str(one.grad_norm)} for one in self.streak],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was; an empty one is that of a run that has begun with these weights."""
        self.skipped_samples = [(first, end) for first, end in state.get("skipped_samples", [])]
        self.count = state.get("skipped_steps", 0)
        self.streak = [
            BadStep(**{**one, "loss": float(one["loss"]), "grad_norm": float(one["grad_norm"])})
            for one in state.get("streak", [])
        ]


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending, those that touch or overlap as one."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged

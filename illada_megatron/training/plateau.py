"""Whether the loss has become flat, told from its slope over the logarithm of the tokens.

A power law falls by ever less a step, but by nearly as much in each doubling of the tokens; so its slope is taken per
doubling, over windows that grow with the run. The losses are noisy and have a heavy tail (weights 1/p), and a spike is
no trend: means of blocks, and of these the median of all pairwise slopes with its rank interval (Theil 1950, Sen 1968),
which takes no distribution for granted and bears a quarter of the blocks being wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from illada_megatron.config import RunConfig
from illada_megatron.config.learning_rate import samples_after

_BLOCKS = 64
"""Blocks in a doubling of the tokens: their lengths keep in proportion to the run's."""
_WINDOWS = (16, 32, 64)
"""Blocks that are judged together: the last 16, 29 and 50 % of the tokens."""
_DEVIATIONS = 2.576
"""Of a normal distribution, both sides: 99 %."""


@dataclass(frozen=True)
class Plateau:
    """Where the loss was found flat."""

    nats_per_doubling: float
    """What a doubling of the tokens would change the loss by (nats/token); below 0: it falls."""
    error: float
    """Half of its 99 % interval."""
    from_tokens: int
    """Consumed where the window begins that tells it."""
    decays: bool
    """The decay begins with the next step (schedule.decay_start)."""

    def text(self, limit: float) -> str:
        """For the terminal; limit: schedule.plateau_nats_per_doubling."""
        then = (
            "the decay begins"
            if self.decays
            else "the rate stays as planned; to decay now, stop and go on with schedule.decay_start=now"
        )
        return (
            f"the loss is flat: since {self.from_tokens:,} tokens it changes by {self.nats_per_doubling:+.4f} +- "
            f"{self.error:.4f} nats/token per doubling of the tokens (limit {limit:g}); {then}"
        )


class PlateauDetector:
    """Means of the losses of the last blocks. Every rank keeps one and feeds it the same losses.

    It begins anew wherever something else than learning moves the loss: at another learning rate, batch size or phase
    of the blend (data.phases).
    """

    def __init__(self, config: RunConfig) -> None:
        schedule, length = config.schedule, config.data.sequence_length
        self.limit = schedule.plateau_nats_per_doubling
        self._phases = [phase.from_tokens for phase in config.data.phases]
        self._sequence_length = length
        tenth = samples_after(config.training, config.training.train_steps) * length // 10
        self.min_tokens = tenth if schedule.plateau_min_tokens is None else schedule.plateau_min_tokens
        self._under: list[float] = []
        """Rate, batch size and phase of the losses below."""
        self._block = [-1.0, 0.0, 0.0, 0.0]
        """The open block: its number, sums of log2(tokens) and losses, count."""
        self._blocks: list[list[float]] = []
        """Mean log2(tokens) and loss of the closed ones."""
        self._told = False

    def observe(self, lr: float, first_sample: int, batch_size: int, loss: float) -> tuple[Plateau | None, bool]:
        """Take note of the loss (nats/token) of a step. Returns where it was found flat, which can be when a block is
        full, and whether that is for the first time since it began anew."""
        first_token = first_sample * self._sequence_length
        under = [lr, batch_size, sum(first_token >= start for start in self._phases)]
        if under != self._under:
            self._under, self._block, self._blocks, self._told = under, [-1.0, 0.0, 0.0, 0.0], [], False
        place = math.log2((first_sample + batch_size) * self._sequence_length)
        number = math.floor(place * _BLOCKS)
        block, full = self._block, number != self._block[0]
        if full:
            if block[3]:
                self._blocks = [*self._blocks[1 - max(_WINDOWS) :], [block[1] / block[3], block[2] / block[3]]]
            block = self._block = [float(number), 0.0, 0.0, 0.0]
        block[1] += place
        block[2] += loss
        block[3] += 1.0
        if not full or first_token < self.min_tokens:
            return None, False
        found = self._flat()
        first = found is not None and not self._told
        self._told |= first
        return found, first

    def _flat(self) -> Plateau | None:
        """By the shortest window that can tell whether the slope is within the limit or beyond it."""
        for size in _WINDOWS:
            blocks = self._blocks[-size:]
            if len(blocks) < size:
                break
            slope, low, high = slope_interval(blocks)
            if -self.limit < low and high < self.limit:
                return Plateau(slope, (high - low) / 2, round(2 ** blocks[0][0]), decays=False)
            if high < -self.limit or low > self.limit:
                break
        return None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: at most 64 blocks."""
        return {"under": self._under, "block": list(self._block), "blocks": self._blocks, "told": self._told}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on where `state` was. One of the rule that was here before (two windows of equal length) says nothing
        to this one, which begins anew."""
        if state is not None and "blocks" in state:
            self._under, self._block = state["under"], list(state["block"])
            self._blocks, self._told = state["blocks"], state["told"]


def slope_interval(points: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """(slope, lower end, upper end) of losses over places, by ascending place: Theil's and Sen's, and the 99 % interval
    that Kendall's rank statistic gives it, wider where neighbouring residuals are alike (by their first
    autocorrelation, as for a mean)."""
    slopes = sorted((y - points[i][1]) / (x - points[i][0]) for j, (x, y) in enumerate(points) for i in range(j))
    slope, count = median(slopes), len(points)
    residuals = [y - slope * x for x, y in points]
    middle = median(residuals)
    residuals = [one - middle for one in residuals]
    squares = sum(one * one for one in residuals)
    alike = sum(one * two for one, two in pairwise(residuals)) / squares if squares else 0.0
    alike = min(max(alike, 0.0), 0.9)
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18 * (1 + alike) / (1 - alike))
    outside = math.floor((len(slopes) - _DEVIATIONS * deviation) / 2)
    outside = max(0, min(outside, len(slopes) // 2))
    return slope, slopes[outside], slopes[-1 - outside]

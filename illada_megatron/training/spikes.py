"""Losses far above what the steps before had."""

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from illada_megatron.config.schema import FaultsConfig

# Of a normal distribution: the standard deviation over the median absolute deviation.
_DEVIATIONS = 1.4826


@dataclass(frozen=True)
class Spike:
    """A step's loss, and what it was compared with (nats/token)."""

    loss: float
    median: float
    standard_deviation: float
    first_sample: int
    end_sample: int
    """The step took the samples [first_sample, end_sample)."""
    t: list[float]
    """Diffusion time of each of them."""


class SpikeDetector:
    """The losses of the last good steps, as long as they are many enough to judge by.

    Median and median absolute deviation: the losses are noisy (weights 1/p) and have a heavy tail, and a mean and
    variance that have just seen a spike would not see the next one. Every rank keeps one and feeds it the same losses.
    """

    def __init__(self, config: FaultsConfig) -> None:
        self._threshold = config.spike_threshold
        self._losses: deque[float] = deque(maxlen=config.spike_window_steps or 0)

    def observe(self, loss: float) -> tuple[float, float] | None:
        """Take note of a good step's loss; where it is a spike, (median, standard deviation) of those before it."""
        losses, spike = self._losses, None
        if losses.maxlen and len(losses) == losses.maxlen:
            middle = median(losses)
            deviation = _DEVIATIONS * median(abs(one - middle) for one in losses)
            if deviation > 0.0 and loss > middle + self._threshold * deviation:
                spike = middle, deviation
        losses.append(loss)
        return spike

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the losses of `state`, the newest that the configuration asks for."""
        self._losses = deque(state.get("losses", []), maxlen=self._losses.maxlen)

"""Runs side by side: figures at the same steps, or the same numbers of tokens."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from illada_megatron.runs.records import Curve, RunRecord

By = Literal["steps", "tokens"]


@dataclass(frozen=True)
class Row:
    """What the runs had at one place, in their order; None: a run has nothing there."""

    at: int
    """Steps or tokens."""
    loss: list[float | None]
    """nats/token: the mean since the row before, for a step's own is noisy (its weights are 1/p)."""
    held_out: list[float | None]
    """nats/token: the last bound measured since the row before."""
    throughput: list[float | None]
    """tokens/s: the mean since the row before."""


def compared(runs: Sequence[RunRecord], by: By, rows: int) -> list[Row]:
    """So many rows at equal distances, the last one where the longest run is."""
    end = max(run.last_step if by == "steps" else run.consumed_tokens for run in runs)
    places = sorted({max(1, round(end * number / rows)) for number in range(1, rows + 1)})
    return [
        Row(
            at,
            [_mean(run.loss, by, begin, at) for run in runs],
            [_last(run.held_out, by, begin, at) for run in runs],
            [_mean(run.throughput, by, begin, at) for run in runs],
        )
        for begin, at in zip([0, *places], places, strict=False)
    ]


def _between(curve: Curve, by: By, begin: int, end: int) -> list[float]:
    """Values at places in (begin, end]."""
    places = curve.steps if by == "steps" else curve.tokens
    return curve.values[bisect_right(places, begin) : bisect_right(places, end)]


def _mean(curve: Curve, by: By, begin: int, end: int) -> float | None:
    values = _between(curve, by, begin, end)
    return fmean(values) if values else None


def _last(curve: Curve, by: By, begin: int, end: int) -> float | None:
    values = _between(curve, by, begin, end)
    return values[-1] if values else None

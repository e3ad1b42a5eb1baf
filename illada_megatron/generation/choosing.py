"""Who chooses: which of a block's masks a step reveals, by the confidence in their candidates.

A rule is a function of (positions [m], confidence [m] float64, settings, masks that the schedule wants) -> rows to
reveal [k], k at least 1, the surest first. Of equals the leftmost is the most confident. A new one is a line of RULES.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from illada_megatron.generation.settings import Reveal, Settings
from illada_megatron.generation.text import Text

Rule = Callable[[Tensor, Tensor, Settings, int], Tensor]


def by_schedule(_positions: Tensor, confidence: Tensor, _settings: Settings, wanted: int) -> Tensor:
    """As many as the block's steps make it (LLaDA)."""
    return _ranked(confidence)[:wanted]


def by_threshold(_positions: Tensor, confidence: Tensor, settings: Settings, _wanted: int) -> Tensor:
    """The best, and all others that are sure enough (Fast-dLLM)."""
    ranked = _ranked(confidence)
    return ranked[: max(1, int((confidence >= settings.threshold).sum()))]


def by_factor(_positions: Tensor, confidence: Tensor, settings: Settings, _wanted: int) -> Tensor:
    """The n-th needs 1 - factor / (n + 1); the first that has less ends it (Fast-dLLM)."""
    ranked = _ranked(confidence)
    needed = 1 - settings.factor / (torch.arange(1, ranked.numel() + 1, dtype=torch.float64) + 1)
    fails = (confidence[ranked] < needed).nonzero().flatten()
    return ranked[: max(1, int(fails[0]) if fails.numel() else ranked.numel())]


def by_hierarchy(positions: Tensor, confidence: Tensor, settings: Settings, _wanted: int) -> Tensor:
    """The best, all that are sure, and of each run of neighbouring masks its best where it is sure enough (dInfer)."""
    chosen = confidence >= settings.threshold
    chosen[_ranked(confidence)[0]] = True
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    for run in torch.arange(positions.numel()).tensor_split(breaks):
        best = run[_ranked(confidence[run])[0]]
        chosen[best] |= confidence[best] >= settings.low_threshold
    ranked = _ranked(confidence)
    return ranked[chosen[ranked]]


RULES: dict[Reveal, Rule] = {
    "steps": by_schedule,
    "threshold": by_threshold,
    "factor": by_factor,
    "hierarchy": by_hierarchy,
}


def choose(text: Text, candidates: Tensor, confidence: Tensor, eos: int | None) -> Tensor:
    """Rows of the block's masks [k] that a step reveals."""
    settings = text.settings
    if settings.eos == "last" and eos is not None:
        ends = candidates == eos
        confidence = confidence - 2.0 * (ends & ~ends.all())  # below every other, in their own order
    wanted = text.schedule.pop(0) if settings.reveal == "steps" else 0
    return RULES[settings.reveal](text.block, confidence, settings, wanted)


def _ranked(confidence: Tensor) -> Tensor:
    return confidence.argsort(descending=True, stable=True)

"""What the training step has to reach, against its peer and against the matrix products alone."""

from typing import Any

from benchmarks.measuring.bars import at_least, time_ratio
from benchmarks.step.step_figures import Figures
from benchmarks.step.step_variants import BARE, OURS, PEER_SETTINGS

# Both sides train on the same samples from the same weights: their losses have to agree, step by step.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
_SPEED_TO_PEER = {"W1": 1.5, "W2": 1.8}
_SPEED_TO_BARE = {"W1": 0.75, "W2": 0.75}
_PEER_MEMORY = {"W2": 2.0}


def step_bars(figures: list[Figures]) -> dict[str, dict[str, Any]]:
    """The bars of the variants that ran; all are bf16's. Speeds are tokens/s, ratios medians of the rounds' own."""
    bars: dict[str, dict[str, Any]] = {}
    found = {(one.variant.workload, one.variant.who): one for one in figures if one.variant.precision == "bf16"}
    for workload in dict.fromkeys(name for name, _ in found):
        ours, bare = found.get((workload, OURS)), found.get((workload, BARE))
        peer = fastest([found[workload, who] for who in PEER_SETTINGS if (workload, who) in found])
        if ours is None:
            continue
        if peer is not None:
            name = f"{workload} bf16 ours / {peer.variant.who}"
            bars[f"{name}: tokens/s"] = _speed(ours, peer, _SPEED_TO_PEER[workload])
            if workload in _PEER_MEMORY:
                times = peer.peak_memory_bytes / ours.peak_memory_bytes
                bars[f"{workload} bf16 {peer.variant.who} / ours: peak memory"] = at_least(
                    _PEER_MEMORY[workload], times, bytes=[peer.peak_memory_bytes, ours.peak_memory_bytes]
                )
        if bare is not None:
            bars[f"{workload} bf16 ours / {BARE}: tokens/s"] = _speed(ours, bare, _SPEED_TO_BARE[workload])
    return bars


def fastest(figures: list[Figures]) -> Figures | None:
    """By the median wall time of a step; None of none."""
    return min(figures, key=lambda one: one.seconds, default=None)


def check_losses(figures: list[Figures], fp32_precision: str) -> str | None:
    """Where two variants of the same workload and precision found another loss: both, step by step."""
    for one in figures:
        precision = one.variant.precision if fp32_precision == "highest" else "bf16"
        for other in figures:
            if (one.variant.workload, one.variant.precision) != (other.variant.workload, other.variant.precision):
                continue
            for timing, others in zip(one.timings, other.timings, strict=True):
                if timing.loss is None or others.loss is None:
                    continue
                if abs(timing.loss - others.loss) > LOSS_TOLERANCE[precision] * abs(others.loss):
                    losses = {each.variant.name: [step.loss for step in each.timings] for each in (one, other)}
                    return f"the losses differ by more than {LOSS_TOLERANCE[precision]:g} of them: {losses}"
    return None


def _speed(ours: Figures, other: Figures, limit: float) -> dict[str, Any]:
    wall, cpu = time_ratio(other.timings, ours.timings)
    return at_least(limit, wall, cpu_seconds_ratio=cpu)

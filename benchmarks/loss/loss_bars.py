"""What the masked loss has to reach, against the matrix products alone and against every peer."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.loss.loss_cases import FUSED, GATHERED_HIDDEN, GEMMS, MAIN_GRAD, PEERS, LossCase, Repetition
from benchmarks.measuring.bars import at_least, at_most, time_ratio
from benchmarks.measuring.processes import Timing

BAR_SHARE = 0.5
_TIME_TO_GEMMS = {("cpu", "bf16"): 1.25, ("cpu", "fp32"): 1.1, ("cuda", "bf16"): 1.15, ("cuda", "fp32"): 1.15}
_SPEED_TO_PEERS = {("cpu", "bf16"): 1.3}
_MEMORY_TO_GATHERED = {"cpu": 1 / 8}


@dataclass
class LossFigures:
    """A variant's repetitions at one masked share."""

    case: LossCase
    share: float
    loss: float | None
    """Before anything was timed; None: it has none."""
    repetitions: list[Repetition] = field(default_factory=list)

    @property
    def timings(self) -> list[Timing]:
        return [one.timing for one in self.repetitions]

    @property
    def seconds(self) -> float:
        """Median wall time."""
        return median(one.seconds for one in self.timings)

    @property
    def cpu_seconds(self) -> float:
        return median(one.cpu_seconds for one in self.timings)

    @property
    def extra_bytes(self) -> int | None:
        """The most of all repetitions."""
        return max((one.extra_bytes for one in self.repetitions if one.extra_bytes is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """Units are in the names; medians over the repetitions."""
        return {
            "device": self.case.device,
            "dtype": self.case.dtype,
            "masked_share": self.share,
            "variant": self.case.variant,
            "loss": self.loss,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "extra_bytes": self.extra_bytes,
            "all_seconds": [one.seconds for one in self.timings],
            "all_cpu_seconds": [one.cpu_seconds for one in self.timings],
            "all_extra_bytes": [one.extra_bytes for one in self.repetitions],
        }


def loss_bars(device: str, dtype: str, figures: list[LossFigures]) -> dict[str, dict[str, Any]]:
    """The bars of a device and dtype, at BAR_SHARE, for the loss as the trainer calls it (into main_grad); with a
    gradient of its own it stands beside. A bar that cannot be measured does not hold."""
    found = {one.case.variant: one for one in figures if one.share == BAR_SHARE}
    ours, own = found.get(MAIN_GRAD), found.get(FUSED)
    name, bars = f"{device} {dtype}", {}
    if GEMMS in found:
        ratios = [time_ratio(one.timings, found[GEMMS].timings) if one else (None, None) for one in (ours, own)]
        bars[f"{name} fused / {GEMMS}: time"] = at_most(
            _TIME_TO_GEMMS[device, dtype], ratios[0][0], cpu_seconds_ratio=ratios[0][1], own_gradient=ratios[1]
        )
    peer = min((found[one] for one in PEERS if one in found), key=lambda one: one.seconds, default=None)
    if peer is not None and (device, dtype) in _SPEED_TO_PEERS:
        ratios = [time_ratio(peer.timings, one.timings) if one else (None, None) for one in (ours, own)]
        bars[f"{name} fastest peer / fused: time"] = at_least(
            _SPEED_TO_PEERS[device, dtype],
            ratios[0][0],
            cpu_seconds_ratio=ratios[0][1],
            own_gradient=ratios[1],
            peer=peer.case.variant,
        )
    if GATHERED_HIDDEN in found and device in _MEMORY_TO_GATHERED:
        theirs = found[GATHERED_HIDDEN].extra_bytes
        extra = [one.extra_bytes if one else None for one in (ours, own)]
        shares = [mine / theirs if mine is not None and theirs else None for mine in extra]
        bars[f"{name} fused / {GATHERED_HIDDEN}: extra memory"] = at_most(
            _MEMORY_TO_GATHERED[device], shares[0], bytes=[extra[0], theirs], own_gradient=shares[1]
        )
    return bars

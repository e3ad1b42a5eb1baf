"""Goodput of a run whose machines fail: formulas for the checkpoint interval, and a simulation beside them.

Notation, all in seconds: M mean time between failures of the whole run, tau training between two saves, s what a save
makes the run wait, d from its begin until the checkpoint is durable (blocking saves: s = d), R from a failure to the
first new step: noticing it, waiting for a machine, starting. A checkpoint that is not durable yet does not count. A
save waits until the one before is durable, so that saves begin every c = max(tau + s, d).
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FaultModel:
    """What happens to a run, and what it costs."""

    gpus: int
    gpu_mtbf_seconds: float
    """Mean time between failures of a GPU with its share of everything around it; exponential."""
    save_stall_seconds: float
    save_seconds: float
    """From the begin of a save until its checkpoint is durable."""
    detect_seconds: float
    """From a failure until the ranks are told to start again."""
    restart_seconds: float
    """From there to the first new step: rendezvous, imports, loading."""
    replacement_seconds: float = 0.0
    """Until a lost machine is back or another stands in; 0: a spare is ready."""
    goes_on_with_fewer: bool = False
    """Train on the machines that are left until then, with a speed in proportion; False: wait."""
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_mtbf_seconds", "gpus_per_node"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected a positive number")
        for name in ("save_stall_seconds", "save_seconds", "detect_seconds", "restart_seconds", "replacement_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or a positive number of seconds")
        if self.save_seconds < self.save_stall_seconds:
            raise ValueError(
                f"save_seconds {self.save_seconds} is below save_stall_seconds {self.save_stall_seconds}: a checkpoint "
                "is durable when the run has stopped waiting for it, or later"
            )
        if self.goes_on_with_fewer and self.gpus <= self.gpus_per_node:
            raise ValueError(
                f"gpus {self.gpus}, gpus_per_node {self.gpus_per_node}: one machine cannot go on with fewer"
            )

    @property
    def mtbf_seconds(self) -> float:
        """M of the whole run."""
        return self.gpu_mtbf_seconds / self.gpus

    @property
    def outage_seconds(self) -> float:
        """R."""
        wait = 0.0 if self.goes_on_with_fewer else self.replacement_seconds
        return self.detect_seconds + wait + self.restart_seconds


@dataclass(frozen=True)
class SimulatedRun:
    """Where the time of a simulated run went: fractions of the wall time, which add up to 1."""

    goodput: float
    """Training that was kept, in time at full speed."""
    saving: float
    """Waiting for saves."""
    repeated: float
    """Training that a failure undid."""
    down: float
    """From failures to first new steps."""
    fewer: float
    """Speed that was missing while machines were."""
    failures: int


def young_interval(stall_seconds: float, mtbf_seconds: float) -> float:
    """tau = sqrt(2 s M). J. W. Young, A first order approximation to the optimum checkpoint interval, Communications of
    the ACM 17 (1974)."""
    return math.sqrt(2 * stall_seconds * mtbf_seconds)


def daly_interval(stall_seconds: float, mtbf_seconds: float) -> float:
    """tau = sqrt(2 s M) (1 + sqrt(s / 2M) / 3 + (s / 2M) / 9) - s for s < 2M, else M. J. T. Daly, A higher order
    estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer Systems 22 (2006)."""
    if stall_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = stall_seconds / (2 * mtbf_seconds)
    return young_interval(stall_seconds, mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_seconds


def expected_goodput(model: FaultModel, interval_seconds: float) -> float:
    """Expectation of the kept share of the time where failures are exponential and the run always has its full size:

        tau e^(-(tau + d)/M) / (M e^(R/M) (1 - e^(-c/M)))

    A failure after the time x since the last start keeps tau for each k = 0, 1, ... with tau + k c + d <= x: the
    numerator and the last factor are the sum of these probabilities. The time from failure to failure is M, and R
    without another failure takes M (e^(R/M) - 1) on average. For blocking saves (s = d) this is Daly's expectation
    (2006), T / T_w = tau / (M e^(R/M) (e^((tau + s)/M) - 1)).
    """
    mtbf = model.mtbf_seconds
    cycle = max(interval_seconds + model.save_stall_seconds, model.save_seconds)
    kept = interval_seconds * math.exp(-(interval_seconds + model.save_seconds + model.outage_seconds) / mtbf)
    return kept / (mtbf * -math.expm1(-cycle / mtbf))


def planned_goodput(model: FaultModel) -> tuple[float, float]:
    """(Daly's interval in seconds, or as long as a save takes; the kept share of the time expected with it)."""
    interval = max(daly_interval(model.save_stall_seconds, model.mtbf_seconds), model.save_seconds, 1.0)
    return interval, expected_goodput(model, interval)


def simulate(model: FaultModel, interval_seconds: float, wall_seconds: float, seed: int) -> SimulatedRun:
    """Event by event: failures, machines that come back, saves. The same seed meets the same sequence of luck.

    interval_seconds: training between two saves at full or lower speed. A failure while the run is down begins the
    outage again. A machine that comes back makes the run save and start again (goes_on_with_fewer).
    """
    if not interval_seconds > 0:
        raise ValueError(f"interval_seconds {interval_seconds}: expected a positive number")
    luck = _standard_exponentials(seed)
    nodes = -(-model.gpus // model.gpus_per_node)
    back: list[float] = []  # when lost machines return
    kept = repeated = saving = down = fewer = now = 0.0
    failures = 0
    while now < wall_seconds:
        speed, left = 1.0 - len(back) / nodes, wall_seconds - now
        to_failure = luck() * model.mtbf_seconds / speed
        to_return = back[0] - now if back else math.inf
        span = min(to_failure, to_return, left)
        trained, durable, waited = _progress(model, interval_seconds, span)
        now += span
        saving += waited
        fewer += trained * (1.0 - speed)
        failed = span == to_failure
        kept += (durable if failed else trained) * speed
        repeated += (trained - durable) * speed if failed else 0.0
        if span == left:
            break
        if not failed:
            heapq.heappop(back)
        planned = model.save_seconds + model.restart_seconds
        lasted, more = _outage(model.outage_seconds if failed else planned, model, luck)
        lost = more + failed
        failures += lost
        if model.goes_on_with_fewer:
            for _ in range(min(lost, nodes - 1 - len(back))):
                heapq.heappush(back, now + model.detect_seconds + model.replacement_seconds)
        down += min(lasted, wall_seconds - now)
        now += lasted
        while back and back[0] <= now:  # returned while the run was down: part of the new start
            heapq.heappop(back)
    return SimulatedRun(
        goodput=kept / wall_seconds,
        saving=saving / wall_seconds,
        repeated=repeated / wall_seconds,
        down=down / wall_seconds,
        fewer=fewer / wall_seconds,
        failures=failures,
    )


def best_interval(
    model: FaultModel, wall_seconds: float, seed: int, candidates: Sequence[float]
) -> tuple[float, SimulatedRun]:
    """The candidate (seconds) with the highest simulated goodput, and its run; all meet the same failures."""
    runs = [(interval, simulate(model, interval, wall_seconds, seed)) for interval in candidates]
    return max(runs, key=lambda pair: pair[1].goodput)


def _progress(model: FaultModel, interval: float, span: float) -> tuple[float, float, float]:
    """(training done, training in durable checkpoints, waiting for saves) after `span` seconds since a start."""
    stall, cycle = model.save_stall_seconds, max(interval + model.save_stall_seconds, model.save_seconds)
    begun = _count(span - interval, cycle)
    durable = _count(span - interval - model.save_seconds, cycle) * interval
    if begun == 0:
        return span, 0.0, 0.0
    since = span - interval - (begun - 1) * cycle
    trained = begun * interval + min(max(since - stall, 0.0), interval)
    return trained, durable, span - trained


def _count(time: float, cycle: float) -> int:
    """How many of 0, cycle, 2 cycle, ... are not after `time`."""
    return math.floor(time / cycle) + 1 if time >= 0 else 0


def _outage(needed: float, model: FaultModel, luck: Callable[[], float]) -> tuple[float, int]:
    """(seconds until the run trains again, failures on the way), where `needed` seconds without a failure are."""
    lasted, failures = 0.0, 0
    while (to_failure := luck() * model.mtbf_seconds) < needed:
        lasted += to_failure
        failures += 1
        needed = model.outage_seconds
    return lasted + needed, failures


def _standard_exponentials(seed: int, block: int = 4096) -> Callable[[], float]:
    """Draws of mean 1."""
    generator = np.random.Generator(np.random.Philox(seed))
    drawn: list[float] = []

    def draw() -> float:
        if not drawn:
            drawn.extend(generator.standard_exponential(block).tolist())
        return drawn.pop()

    return draw

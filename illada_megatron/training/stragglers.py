"""Which rank is slow. In a synchronous step all ranks take equally long: the quick ones wait for the slow one, and only
what a rank does between its waits tells them apart."""

import socket
import time
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

import torch
import torch.distributed as dist

from illada_megatron.checkpoint.files.agreement import gathered
from illada_megatron.config.layout import Layout
from illada_megatron.runtime import Runtime

# megatron-core's schedules time these around a micro-batch's forward and backward pass, our loader included; what they
# send to and wait for from other stages and the reduction of gradients lie outside of both.
_COMPUTE = ("forward-compute", "backward-compute")


class ComputeClock:
    """What megatron-core's schedules take for their timers (`ModelParallelConfig.timers`): adds up the seconds of the
    forward and backward passes. On a GPU they are read from events once a step, which has been waited for by then."""

    def __init__(self, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._passes: list[tuple[Any, Any]] = []
        self._begin: Any = None
        self._seconds = 0.0
        self._steps = 0
        self._hosts: list[str] = []

    def __call__(self, name: str, **_: Any) -> "ComputeClock | _Ignored":
        return self if name in _COMPUTE else _IGNORED

    def start(self, **_: Any) -> None:
        """Called by megatron-core. Its `barrier` would make all ranks alike, and is not obeyed."""
        self._begin = self._now()

    def stop(self, **_: Any) -> None:
        """Called by megatron-core."""
        self._passes.append((self._begin, self._now()))

    def begin_step(self) -> None:
        """What has been timed since the last step (validation) does not count."""
        self._passes.clear()

    def end_step(self) -> None:
        """The passes of a step are over."""
        if self._is_cuda and self._passes:
            self._passes[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._passes) / 1000.0
        else:
            self._seconds += sum(end - begin for begin, end in self._passes)
        self._steps += 1
        self._passes.clear()

    def gather(self, run: Runtime) -> "ComputeTimes":
        """Every rank's mean over the steps since the last call. All ranks call it."""
        own = torch.tensor([self._seconds / max(1, self._steps)], dtype=torch.float64, device=run.device.torch_device)
        self._seconds, self._steps = 0.0, 0
        seconds = torch.empty(run.world_size, dtype=torch.float64, device=run.device.torch_device)
        if run.world_size > 1:
            dist.all_gather_into_tensor(seconds, own)
        else:
            seconds.copy_(own)
        self._hosts = self._hosts or gathered(socket.gethostname())
        return ComputeTimes(run.layout, self._hosts, seconds.tolist())

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Ignored:
    """Any other of megatron-core's timers."""

    def start(self, **_: Any) -> None: ...

    def stop(self, **_: Any) -> None: ...


_IGNORED = _Ignored()


@dataclass(frozen=True)
class ComputeTimes:
    """Mean seconds of a step that each rank has computed."""

    layout: Layout
    hosts: list[str]
    seconds: list[float]

    def scalars(self) -> dict[str, float]:
        """For TensorBoard."""
        return {
            "compute_seconds_min": min(self.seconds),
            "compute_seconds_median": median(self.seconds),
            "compute_seconds_max": max(self.seconds),
            "slowest_rank": float(self.seconds.index(max(self.seconds))),
        }

    def straggler(self, ratio: float) -> str | None:
        """The rank that is slowest against those of its own stage and tensor slice in the other data-parallel replicas,
        which do the same; None where it takes less than `ratio` times as long as the median of them."""
        worst, text = ratio, None
        for rank, own in enumerate(self.seconds):
            others = median_low([self.seconds[one] for one in self._peers(rank)])
            if own > worst * others > 0.0:
                worst = own / others
                text = (
                    f"straggler: rank {rank} on {self.hosts[rank]} computes {own:.3f} s of a step, "
                    f"{worst:.2f} times the median of its {len(self._peers(rank))} data-parallel peers ({others:.3f} s)"
                )
        return text

    def _peers(self, rank: int) -> range:
        """Ranks that differ in their data- or context-parallel number alone, itself included; megatron-core counts
        tensor, then context, then data, then pipeline."""
        tensor, data = self.layout.tensor, self.layout.data * self.layout.context
        first = rank // (tensor * data) * (tensor * data) + rank % tensor
        return range(first, first + tensor * data, tensor)

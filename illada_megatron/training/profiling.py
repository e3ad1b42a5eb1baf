"""training.profile: what a few steps of a few ranks are made of, as files in run_dir's traces folder.

    torch   a trace of torch's profiler (chrome://tracing, ui.perfetto.dev), kernels and collectives included; on a GPU
            with `memory` also the allocator's history (pytorch.org/memory_viz)
    nsys    names for NVIDIA's profiler, which is told where to begin and to end:
            nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop illada train ...

The steps that are recorded take longer. A trace that cannot be written is said, and the run goes on.
"""

import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity

from illada_megatron.config import ConfigError
from illada_megatron.config.schema import ProfileConfig
from illada_megatron.runtime import Runtime
from illada_megatron.runtime.spans import named_spans
from illada_megatron.system.terminal import say

_ALLOCATIONS = 1_000_000  # the newest ones, of which a snapshot tells


class Profiler:
    """Of a whole run; records the steps that `settings` names, where this rank is one of those asked."""

    def __init__(self, settings: ProfileConfig | None, run: Runtime, traces: Path | None) -> None:
        """Raises ConfigError where what is asked cannot be recorded here."""
        self._first, self._last = settings.steps if settings is not None else (0, 0)
        self._settings, self._run, self._traces = settings, run, traces
        self._recording: ExitStack | None = None
        self._finish: Callable[[], list[Path]] = list
        if settings is None:
            return
        if settings.tool == "nsys" and not run.device.is_cuda:
            raise ConfigError("training.profile.tool nsys needs a GPU, and this run computes on CPUs: take torch")
        if run.rank == 0 and max(settings.ranks) >= run.world_size:  # a run may have lost machines
            say(
                f"warning: training.profile.ranks {settings.ranks} has ranks that are not there: the run has "
                f"{run.world_size}, from 0 on; the others are recorded",
                error=True,
            )
        if run.rank not in settings.ranks:
            self._settings = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (said := self._end()) is not None:  # the run ends within its steps
            say(said, error=True)

    def begins(self, step: int) -> None:
        """Step `step` comes next."""
        if self._settings is None or self._recording is not None or not self._first <= step <= self._last:
            return
        self._recording = ExitStack()
        self._recording.enter_context(named_spans(nvtx=self._settings.tool == "nsys"))
        begin = self._begin_nsys if self._settings.tool == "nsys" else self._begin_torch
        begin(self._recording, self._settings, step)

    def ended(self, step: int) -> str | None:
        """Step `step` is done. What the user should hear, once the last one is."""
        return self._end() if step >= self._last else None

    def _end(self) -> str | None:
        """Write what was recorded, if anything was. What the user should hear."""
        if self._recording is None:
            return None
        if self._run.device.is_cuda:
            torch.cuda.synchronize()
        self._recording.close()
        self._recording, self._settings = None, None
        try:
            written = self._finish()
        except (OSError, RuntimeError) as error:
            return f"warning: the trace of rank {self._run.rank} could not be written: {error}"
        return f"rank {self._run.rank} has written {', '.join(map(str, written))}" if written else None

    def _begin_nsys(self, recording: ExitStack, _: ProfileConfig, __: int) -> None:
        torch.cuda.profiler.start()
        recording.callback(torch.cuda.profiler.stop)

    def _begin_torch(self, recording: ExitStack, settings: ProfileConfig, step: int) -> None:
        cuda = self._run.device.is_cuda
        history = settings.memory and cuda
        profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
            record_shapes=True,
            profile_memory=settings.memory,
        )
        if history:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        recording.enter_context(profiler)
        assert self._traces is not None  # run_dir is required with training.profile
        name = f"profile_rank_{self._run.rank:05d}_steps_{step}_{self._last}"
        trace, memory = self._traces / f"{name}.json.gz", self._traces / f"{name}_memory.pickle"

        def finish() -> list[Path]:
            trace.parent.mkdir(parents=True, exist_ok=True)
            _whole(trace, lambda path: profiler.export_chrome_trace(str(path)))
            if not history:
                return [trace]
            _whole(memory, lambda path: torch.cuda.memory._dump_snapshot(str(path)))
            torch.cuda.memory._record_memory_history(enabled=None)
            return [trace, memory]

        self._finish = finish


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file that somebody else writes, there as a whole or not at all."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.{path.name}")  # torch goes by the name's end
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

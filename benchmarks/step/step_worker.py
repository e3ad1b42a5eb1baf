"""A process of the step benchmark: one variant, one command at a time, so that the variants can take turns."""

import resource
import sys
import tempfile
import warnings
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from benchmarks.measuring.processes import timed
from benchmarks.step.step_figures import Figures, Part, Work
from benchmarks.step.step_variants import BARE, OURS, PEER_SETTINGS, SAME_LAYERS, Settings, Variant
from benchmarks.step.workloads import Workload, write_corpus
from illada_megatron.config import RunConfig, load_config

if TYPE_CHECKING:  # the process that starts the measuring ones imports this module, and has to stay small
    from benchmarks.step.part_clock import PartClock
    from illada_megatron.runtime import Runtime


class Subject(Protocol):
    """Whose step is measured."""

    work: Work

    def step(self) -> float | None:
        """One step over the global batch; returns its loss (nats/token) when the device is done."""


class FollowedSubject(Subject, Protocol):
    """One that says where its time goes."""

    def followed(self) -> AbstractContextManager["PartClock"]:
        """Within the context, a step's time is charged part by part to the clock."""


def measure(connection: Connection, variant: Variant, workload: Workload, settings: Settings) -> None:
    """Answer "warm up" and "step" with a Timing, "finish" (with whether a breakdown is wanted) with Figures."""
    silence_known_warnings()
    import torch

    from benchmarks.measuring.arithmetic import environment
    from illada_megatron.runtime import runtime

    torch.set_float32_matmul_precision(settings.fp32_precision)
    with tempfile.TemporaryDirectory(prefix="illada-bench-") as folder:
        config = run_config(workload, variant.precision, settings.threads, Path(folder))
        with runtime(config) as run:
            if settings.weights_on_device:
                _draw_on_device()
            subject = open_subject(variant.who, config, run)
            figures = Figures(variant, subject.work, environment(run.device.name))
            connection.send("ready")
            while (command := connection.recv())[0] != "finish":
                timing = timed(subject.step)
                if command[0] == "step":
                    figures.timings.append(timing)
                connection.send(timing)
            figures.peak_memory_bytes = _peak_memory_bytes(run.device.is_cuda)
            if command[1] and variant.who == OURS:
                _follow(subject, figures)
    connection.send(figures)


def run_config(workload: Workload, precision: str, threads: int | None, folder: Path) -> RunConfig:
    """The run of one process; `folder` takes its corpus."""
    prefix = write_corpus(folder / "train", workload)
    settings = [*workload.overrides(), f"data.train_paths=[{prefix}]", f"training.precision={precision}"]
    if threads is not None:
        settings.append(f"runtime.num_threads={threads}")
    return load_config("tiny", settings)


def _draw_on_device() -> None:
    """Ours and the peers' models: see quick_weights.py."""
    from benchmarks.step import megatron_step
    from benchmarks.step.quick_weights import fill_on_device
    from illada_megatron.training import setup

    megatron_step.fill_initial_weights = fill_on_device
    setup.fill_initial_weights = fill_on_device


def open_subject(who: str, config: RunConfig, run: "Runtime") -> Subject:
    """Imported here: megatron-core binds names of torch.cuda, which the CPU adaptor has to replace before."""
    if who == OURS:
        from benchmarks.step.illada_step import IlladaStep

        return IlladaStep(config, run)
    if who == BARE:
        from benchmarks.step.bare_gemms import BareGemms

        return BareGemms(config, run)
    if who == SAME_LAYERS:
        from benchmarks.step.same_layers_step import SameLayersStep

        return SameLayersStep(config, run)
    from benchmarks.step.megatron_step import MegatronStep

    return MegatronStep(config, run, PEER_SETTINGS[who])


def silence_known_warnings() -> None:
    """Of megatron-core about what is not installed and names it uses, and of torch about an embedding's hooks, which
    are called as part_clock.py expects."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


def _follow(subject: FollowedSubject, figures: Figures) -> None:
    """One more step, part by part."""
    with subject.followed() as clock:
        figures.followed = timed(subject.step)
    figures.parts = [Part(*key, spent.seconds, spent.cpu_seconds) for key, spent in clock.spent.items()]


def _peak_memory_bytes(on_cuda: bool) -> int:
    if on_cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

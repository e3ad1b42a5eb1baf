"""A measuring process: one variant, one command at a time, so that the variants can take turns.

Started by train_step.py as a process of its own: its peak memory is then the variant's.
"""

import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from step_figures import Figures, Part, Timing, Variant
from workloads import Workload


def measure(connection: Connection, variant: Variant, workload: Workload, threads: int | None) -> None:
    """Answer "warm up" and "step" with a Timing, "finish" (with whether a breakdown is wanted) with Figures."""
    _silence_known_warnings()
    from illada_step import open_illada_step

    with (
        tempfile.TemporaryDirectory(prefix="illada-bench-") as folder,
        open_illada_step(workload, variant.precision, threads, Path(folder)) as subject,
    ):
        figures = Figures(variant, subject.work, _environment(subject.run.device.name))
        connection.send("ready")
        while (command := connection.recv())[0] != "finish":
            timing = _timed(subject.step)
            if command[0] == "step":
                figures.timings.append(timing)
            connection.send(timing)
        figures.peak_memory_bytes = _peak_memory_bytes(subject.run.device.is_cuda)
        if command[1]:
            with subject.followed() as clock:
                figures.followed = _timed(subject.step)
            figures.parts = [Part(*key, spent.seconds, spent.cpu_seconds) for key, spent in clock.spent.items()]
        connection.send(figures)


def _silence_known_warnings() -> None:
    """Of megatron-core about what is not installed and names it uses, and of torch about an embedding's hooks, which
    are called as part_clock.py expects."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


def _timed(function: Callable[[], None]) -> Timing:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    function()
    return Timing(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _peak_memory_bytes(on_cuda: bool) -> int:
    if on_cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _environment(device: str) -> dict[str, Any]:
    import torch

    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
    }

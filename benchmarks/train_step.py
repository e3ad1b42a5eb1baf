"""How fast a training step of one process is, what it costs, and where the time goes.

    python benchmarks/train_step.py --workload W1 --precision bf16

Every workload and precision runs in a process of its own (its peak memory is then its own), through the same functions
as `illada train`. The processes take turns, a step each a round, so that whatever else the machine does hits all alike;
medians are reported. The last line is JSON.
"""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from step_figures import Figures, Variant, show
from step_worker import measure
from workloads import PRECISIONS, TINY_WORKLOADS, WORKLOADS, Workload

WorkloadName = StrEnum("WorkloadName", {name: name for name in WORKLOADS})
Precision = StrEnum("Precision", {name: name for name in PRECISIONS})


class Worker:
    """The measuring process of a variant, from this side."""

    def __init__(self, variant: Variant, workload: Workload, threads: int | None) -> None:
        self.variant = variant
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=measure, args=(theirs, variant, workload, threads), daemon=True
        )
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def receive(self) -> Any:
        """Its next answer; exits with 1 where it died, having said why on stderr."""
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            print(f"{self.variant.name}: its process ended with {self._process.exitcode}", file=sys.stderr)
            sys.exit(1)

    def ask(self, command: str, *arguments: Any) -> Any:
        """Send a command and wait for the answer."""
        self._connection.send((command, *arguments))
        return self.receive()


def main(
    workload: Annotated[
        list[WorkloadName] | None, typer.Option("--workload", "-w", help="W1, W2; again for more. Default: all.")
    ] = None,
    precision: Annotated[
        list[Precision] | None, typer.Option("--precision", "-p", help="bf16, fp32; again for more. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each variant.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them that are not counted.")] = 1,
    breakdown: Annotated[bool, typer.Option(help="One more step, followed part by part.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the cores.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Miniatures of the workloads, to try the script.")] = False,
) -> None:
    """Measure the training step: tokens/s, CPU seconds per token, peak memory, time by part.

    Example: python benchmarks/train_step.py --workload W1 --precision bf16 --precision fp32 --rounds 3
    """
    shapes = TINY_WORKLOADS if tiny else WORKLOADS
    variants = [Variant(name, kind) for name in workload or list(WORKLOADS) for kind in precision or PRECISIONS]
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # a file is taken for 80 columns, too few for four variants
    report: dict[str, Any] = {
        "benchmark": "train_step",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "settings": {"tiny": tiny, "warmup": warmup, "rounds": rounds},
    }
    shaped = [(one, shapes[one.workload]) for one in variants]
    figures = _measure_in_turns(console, shaped, rounds, warmup, breakdown, threads)
    report["machine"] |= {"load_after": os.getloadavg()[0], "python": platform.python_version()}
    report["machine"] |= figures[0].environment
    report["results"] = [one.to_json() for one in figures]
    show(console, report["results"])
    print(json.dumps(report))


def _measure_in_turns(
    console: Console,
    variants: list[tuple[Variant, Workload]],
    rounds: int,
    warmup: int,
    breakdown: bool,
    threads: int | None,
) -> list[Figures]:
    """Set all up at once, then one step of each a round."""
    workers = [Worker(variant, workload, threads) for variant, workload in variants]
    for worker in workers:
        worker.receive()
    for number in range(1 - warmup, rounds + 1):
        for worker in workers:
            timing = worker.ask("step" if number > 0 else "warm up")
            title = f"round {number}/{rounds}" if number > 0 else "warm-up"
            console.print(f"{title}  {worker.variant.name}  {timing.seconds:.2f} s, {timing.cpu_seconds:.2f} CPU s")
    return [worker.ask("finish", breakdown) for worker in workers]


def _cpu_model() -> str:
    """As the kernel names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit that is measured; None outside of git."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or None


if __name__ == "__main__":
    typer.run(main)

"""How fast a training step of one process is, what it costs, and where the time goes: ours, megatron-core's own, and
the matrix products alone.

    python -m benchmarks.step.train_step --workload W1 --precision bf16

Every variant runs in a process of its own (its peak memory is then its own): ours through the same functions as
`illada train`. The processes of a workload take turns, a step each a round, so that whatever else the machine does hits
all alike; medians are reported. The last line is JSON.
"""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.measuring.bars import show_bars, verdict
from benchmarks.measuring.machine import commit, cpu_model, prepare_environment
from benchmarks.measuring.processes import Fp32Precision, MeasuringProcess
from benchmarks.step.step_bars import check_losses, step_bars
from benchmarks.step.step_figures import Figures, show
from benchmarks.step.step_variants import BARE, MEGATRON, OURS, SUBJECTS, Settings, Variant
from benchmarks.step.step_worker import measure
from benchmarks.step.workloads import PRECISIONS, TINY_WORKLOADS, WORKLOADS, Workload

WorkloadName = StrEnum("WorkloadName", {name: name for name in WORKLOADS})
Precision = StrEnum("Precision", {name: name for name in PRECISIONS})
Who = StrEnum("Who", {name: name for name in SUBJECTS})


def main(
    workload: Annotated[
        list[WorkloadName] | None, typer.Option("--workload", "-w", help="W1, W2; again for more. Default: all.")
    ] = None,
    precision: Annotated[
        list[Precision] | None, typer.Option("--precision", "-p", help="bf16, fp32; again for more. Default: all.")
    ] = None,
    who: Annotated[list[Who] | None, typer.Option(help=f"Again for more. Default: {OURS}; {MEGATRON}; {BARE}.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each variant.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them that are not counted.")] = 1,
    breakdown: Annotated[bool, typer.Option(help="One more step of ours, followed part by part.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the cores.")] = None,
    fp32_precision: Annotated[
        Fp32Precision, typer.Option(help="torch.set_float32_matmul_precision, of all variants.")
    ] = Fp32Precision.highest,
    huge_pages: Annotated[bool, typer.Option(help="Set THP_MEM_ALLOC_ENABLE for torch.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Miniatures of the workloads, to try the script.")] = False,
) -> None:
    """Measure the training step: tokens/s, CPU seconds per token, peak memory, time by part.

    Example: python -m benchmarks.step.train_step --workload W1 --precision bf16 --precision fp32 --rounds 3
    """
    shapes = TINY_WORKLOADS if tiny else WORKLOADS
    subjects = who or [Who(one) for one in (OURS, MEGATRON, BARE)]
    prepare_environment(huge_pages)
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # a file is taken for 80 columns, too few for four variants
    report: dict[str, Any] = {
        "benchmark": "train_step",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "settings": {"tiny": tiny, "warmup": warmup, "rounds": rounds, "huge_pages": huge_pages},
    }
    figures: list[Figures] = []
    for name in workload or list(WorkloadName):
        variants = [Variant(name, kind, one) for kind in precision or PRECISIONS for one in subjects]
        settings = Settings(threads, fp32_precision)
        figures += _measure_in_turns(console, shapes[name], variants, settings, rounds, warmup, breakdown)
    if difference := check_losses(figures, fp32_precision):
        print(difference, file=sys.stderr)
        sys.exit(1)
    report["machine"] |= {"load_after": os.getloadavg()[0], "python": platform.python_version()}
    report["machine"] |= figures[0].environment
    report["results"] = [one.to_json() for one in figures]
    report |= verdict(step_bars(figures))
    show(console, report["results"])
    show_bars(console, report["bars"])
    print(json.dumps(report))


def _measure_in_turns(
    console: Console,
    workload: Workload,
    variants: list[Variant],
    settings: Settings,
    rounds: int,
    warmup: int,
    breakdown: bool,
) -> list[Figures]:
    """Set all up at once, then one step of each a round, beginning with another each time."""
    processes = [MeasuringProcess(one.name, measure, one, workload, settings) for one in variants]
    for process in processes:
        process.receive()
    for number in range(1 - warmup, rounds + 1):
        first = number % len(processes)
        for process in processes[first:] + processes[:first]:
            timing = process.ask("step" if number > 0 else "warm up")
            title = f"round {number}/{rounds}" if number > 0 else "warm-up"
            console.print(f"{title}  {process.name}  {timing.seconds:.2f} s, {timing.cpu_seconds:.2f} CPU s")
    return [process.finish(breakdown) for process in processes]


if __name__ == "__main__":
    typer.run(main)

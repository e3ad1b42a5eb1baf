"""What the masked loss alone costs: time and memory of its forward and backward pass, ours and others'.

    python -m benchmarks.loss.masked_cross_entropy --masked-share 0.5 --dtype bf16

Loss = sum_i w_i CE(hidden_i @ weight^T, label_i) over masked rows, with gradients of hidden and weight. Every variant
has a process of its own; they take turns, a repetition each a round. The three matrix products of the masked rows into
buffers that exist already are the yardstick. The last line is JSON.
"""

import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.loss.loss_bars import LossFigures, loss_bars
from benchmarks.loss.loss_cases import DTYPES, GEMMS, SHAPES, TINY_SHAPE, VARIANTS, LossCase
from benchmarks.loss.loss_worker import measure
from benchmarks.measuring.bars import show_bars, time_ratio, verdict
from benchmarks.measuring.machine import commit, cpu_model, prepare_environment
from benchmarks.measuring.processes import Fp32Precision, MeasuringProcess

Dtype = StrEnum("Dtype", {name: name for name in DTYPES})
Who = StrEnum("Who", {name: name for name in VARIANTS})
DeviceName = StrEnum("DeviceName", {name: name for name in SHAPES})
MASKED_SHARES = (0.15, 0.5, 0.85)
# bf16: cross-entropies that F.cross_entropy rounds to bf16, summed
_LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}


def main(
    masked_share: Annotated[
        list[float] | None, typer.Option(help="Masked rows / rows; again for more. Default: 0.15, 0.5, 0.85.")
    ] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="bf16, fp32; again for more. Default: all.")] = None,
    device: Annotated[DeviceName | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    who: Annotated[list[Who] | None, typer.Option(help="Again for more. Default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed repetitions of each variant and share.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the cores.")] = None,
    fp32_precision: Annotated[
        Fp32Precision, typer.Option(help="torch.set_float32_matmul_precision, of all variants.")
    ] = Fp32Precision.highest,
    huge_pages: Annotated[bool, typer.Option(help="Set THP_MEM_ALLOC_ENABLE for torch.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A miniature, to try the script.")] = False,
) -> None:
    """Measure the masked loss: wall and CPU seconds and extra memory of forward and backward pass.

    Example: python -m benchmarks.loss.masked_cross_entropy --masked-share 0.5 --dtype bf16 --rounds 3
    """
    prepare_environment(huge_pages)
    place: str = device or _default_device()
    shape = TINY_SHAPE if tiny else SHAPES[place]
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    report: dict[str, Any] = {
        "benchmark": "masked_cross_entropy",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "settings": {"tiny": tiny, "rounds": rounds, "huge_pages": huge_pages, "shape": asdict(shape)},
        "results": [],
        "missing": {},
    }
    bars: dict[str, dict[str, Any]] = {}
    for kind in dtype or list(Dtype):
        cases = [LossCase(one, place, kind, shape, threads, fp32_precision) for one in who or list(Who)]
        figures, missing, environment = _measure_in_turns(console, cases, masked_share or list(MASKED_SHARES), rounds)
        report["results"] += [one.to_json() for one in figures]
        report["missing"] |= missing
        report["machine"] |= environment
        bars |= loss_bars(place, kind, figures)
        _show(
            console, f"{place} {kind}, {shape.rows:,} rows, head {shape.vocab_size:,} x {shape.hidden_size:,}", figures
        )
    report["machine"] |= {"load_after": os.getloadavg()[0], "python": platform.python_version()}
    for name, reason in report["missing"].items():
        console.print(f"missing: {name}: {reason}")
    show_bars(console, bars)
    print(json.dumps(report | verdict(bars)))


def _measure_in_turns(
    console: Console, cases: list[LossCase], shares: list[float], rounds: int
) -> tuple[list[LossFigures], dict[str, str], dict[str, Any]]:
    """Start all, compare their losses, then one repetition of each a round and share, beginning with another each time.

    Returns the figures, why variants are missing, and the environment."""
    processes = {case: MeasuringProcess(case.name, measure, case) for case in cases}
    missing = {case.variant: reason for case in cases if (reason := processes[case].receive()) is not None}
    running = [case for case in cases if case.variant not in missing]
    figures: list[LossFigures] = []
    for share in shares:  # the first repetition warms up
        found = [LossFigures(case, share, processes[case].ask("run", share).timing.loss) for case in running]
        _check_losses(found)
        figures += found
    for number in range(rounds):
        first = number % len(figures)
        for one in figures[first:] + figures[:first]:
            one.repetitions.append(processes[one.case].ask("run", one.share))
        console.print(f"round {number + 1}/{rounds}  {running[0].device} {running[0].dtype}")
    environments = [processes[case].finish() for case in running]
    return figures, missing, environments[0]


def _check_losses(figures: list[LossFigures]) -> None:
    """Exits with 1 where a variant's loss is far from the others'."""
    losses = {one.case.name: one.loss for one in figures if one.loss is not None}
    case, expected = figures[0].case, median(losses.values())
    tolerance = _LOSS_TOLERANCE[case.dtype if case.fp32_precision == Fp32Precision.highest else "bf16"]
    if any(abs(loss - expected) > tolerance * expected for loss in losses.values()):
        print(
            f"losses at masked share {figures[0].share} differ by more than {tolerance:g} of them: {losses}",
            file=sys.stderr,
        )
        sys.exit(1)


def _show(console: Console, title: str, figures: list[LossFigures]) -> None:
    """A table a masked share: wall seconds, their ratio to the products', CPU seconds and extra memory."""
    for share in dict.fromkeys(one.share for one in figures):
        table = Table(title=f"{title}, {share:g} masked (medians)", title_justify="left")
        for heading in ("", "s", "x GEMMs", "CPU s", "extra MiB"):
            table.add_column(heading, justify="right" if heading else "left")
        found = {one.case.variant: one for one in figures if one.share == share}
        for variant, one in found.items():
            memory = "" if one.extra_bytes is None else f"{one.extra_bytes / 2**20:,.1f}"
            ratio = time_ratio(one.timings, found[GEMMS].timings)[0]
            table.add_row(variant, f"{one.seconds:.3f}", f"{ratio:.2f}", f"{one.cpu_seconds:.3f}", memory)
        console.print(table)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    typer.run(main)

"""The figures of the step benchmark, and what becomes of them: tables for people, JSON for programs. No torch here."""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measuring.processes import Timing
from benchmarks.step.step_variants import Variant

PARTS = ("attention", "MLP", "head and loss", "embedding", "optimizer", "other")


@dataclass(frozen=True)
class Work:
    """What a step has to do."""

    tokens: int
    masked_tokens: int
    squared_lengths: int
    """sum over segments of length^2 (tokens^2)."""
    parameters: int
    flops: float
    """Matrix products, forward and backward: illada_megatron.training.flops."""
    part_flops: dict[str, float]
    """The same by part; parts without matrix products are left out."""


@dataclass(frozen=True)
class Part:
    """Time of a part of the step, forward and backward, in the followed step."""

    part: str
    detail: str
    seconds: float
    cpu_seconds: float


@dataclass
class Figures:
    """What a variant's process found."""

    variant: Variant
    work: Work
    environment: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)
    peak_memory_bytes: int = 0
    """Of the process, from its start through the timed steps (on a GPU: allocated on it)."""
    followed: Timing | None = None
    """The step that the breakdown is of."""
    parts: list[Part] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median wall time of a step."""
        return median(timing.seconds for timing in self.timings)

    @property
    def cpu_seconds(self) -> float:
        """Median CPU time of a step."""
        return median(timing.cpu_seconds for timing in self.timings)

    def to_json(self) -> dict[str, Any]:
        """Units are in the names; medians over the timed steps."""
        return {
            "workload": self.variant.workload,
            "precision": self.variant.precision,
            "who": self.variant.who,
            "parameters": self.work.parameters,
            "tokens_per_step": self.work.tokens,
            "masked_tokens_per_step": self.work.masked_tokens,
            "flops_per_step": self.work.flops,
            "step_seconds": [timing.seconds for timing in self.timings],
            "step_cpu_seconds": [timing.cpu_seconds for timing in self.timings],
            "losses": [timing.loss for timing in self.timings],
            "tokens_per_second": self.work.tokens / self.seconds,
            "cpu_seconds_per_token": self.cpu_seconds / self.work.tokens,
            "achieved_tflops": self.work.flops / self.seconds / 1e12,
            "achieved_tflops_per_cpu": self.work.flops / self.cpu_seconds / 1e12,
            "peak_memory_bytes": self.peak_memory_bytes,
            "breakdown_step": asdict(self.followed) if self.followed else None,
            "parts": {name: self._part(name) for name in PARTS} if self.followed else None,
        }

    def _part(self, name: str) -> dict[str, Any]:
        details = {one.detail: one for one in self.parts if one.part == name}
        return {
            "seconds": sum(one.seconds for one in details.values()),
            "cpu_seconds": sum(one.cpu_seconds for one in details.values()),
            "flops": self.work.part_flops.get(name, 0.0),
            "details": {key: {"seconds": one.seconds, "cpu_seconds": one.cpu_seconds} for key, one in details.items()},
        }


def show(console: Console, results: list[dict[str, Any]]) -> None:
    """Two tables of `Figures.to_json`: the steps, and where their CPU time goes."""
    table = Table(title="Training step (medians)", title_justify="left")
    for heading in ("", "tokens/s", "CPU ms/token", "TFLOP/s", "GFLOP per CPU s", "peak memory GiB", "step s", "steps"):
        table.add_column(heading, justify="right" if heading else "left")
    for result in results:
        table.add_row(
            _name(result),
            f"{result['tokens_per_second']:,.0f}",
            f"{1e3 * result['cpu_seconds_per_token']:.2f}",
            f"{result['achieved_tflops']:.4f}",
            f"{1e3 * result['achieved_tflops_per_cpu']:.1f}",
            f"{result['peak_memory_bytes'] / 2**30:.2f}",
            f"{median(result['step_seconds']):.2f}",
            f"{len(result['step_seconds'])}",
        )
    console.print(table)
    if followed := [result for result in results if result["parts"]]:
        console.print(_parts_table(followed))


def _parts_table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="Where a step's CPU seconds go (share; GFLOP per CPU second)", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(_name(result), justify="right")
    for name in PARTS:
        table.add_row(f"[bold]{name}", *(_cell(result, result["parts"][name]) for result in results), style="bold")
        details = dict.fromkeys(detail for result in results for detail in result["parts"][name]["details"])
        for detail in details if len(details) > 1 else ():
            found = [result["parts"][name]["details"].get(detail) for result in results]
            cells = [_cell(result, one) if one else "" for result, one in zip(results, found, strict=True)]
            table.add_row(f"  {detail}", *cells)
    table.add_row("sum", *(f"{sum(part['cpu_seconds'] for part in one['parts'].values()):.2f}" for one in results))
    return table


def _cell(result: dict[str, Any], spent: dict[str, Any]) -> str:
    share = spent["cpu_seconds"] / result["breakdown_step"]["cpu_seconds"]
    speed = f"; {spent['flops'] / spent['cpu_seconds'] / 1e9:3.0f}" if spent.get("flops") else ""
    return f"{spent['cpu_seconds']:.2f} ({share:.1%}{speed})"


def _name(result: dict[str, Any]) -> str:
    return Variant(result["workload"], result["precision"], result["who"]).name

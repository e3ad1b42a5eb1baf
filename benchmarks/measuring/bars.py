"""What a benchmark promises, and whether it holds."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measuring.processes import Timing


def time_ratio(slower: Sequence[Timing], faster: Sequence[Timing]) -> tuple[float, float]:
    """Medians of the rounds' own ratios: (wall, CPU seconds)."""
    rounds = list(zip(slower, faster, strict=True))
    wall = median(one.seconds / other.seconds for one, other in rounds)
    return wall, median(one.cpu_seconds / other.cpu_seconds for one, other in rounds)


def at_least(limit: float, value: float | None, **figures: Any) -> dict[str, Any]:
    """`value` has to reach the limit; `figures` stand beside it. None, what could not be measured, does not hold."""
    return {"value": value, "at_least": limit, **figures, "holds": value is not None and value >= limit}


def at_most(limit: float, value: float | None, **figures: Any) -> dict[str, Any]:
    """`value` must not exceed the limit."""
    return {"value": value, "at_most": limit, **figures, "holds": value is not None and value <= limit}


def verdict(bars: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For the last line: the bars, and whether all hold; not where none was measured."""
    return {"bars": bars, "holds": bool(bars) and all(bar["holds"] for bar in bars.values())}


def show_bars(console: Console, bars: dict[str, dict[str, Any]]) -> None:
    """A table of them."""
    table = Table(title="What has to hold", title_justify="left")
    for heading in ("", "found", "asked", "holds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, bar in bars.items():
        asked = f">= {bar['at_least']:.3g}" if "at_least" in bar else f"<= {bar['at_most']:.3g}"
        found = "missing" if bar["value"] is None else f"{bar['value']:.3f}"
        table.add_row(name, found, asked, "yes" if bar["holds"] else "[bold red]no")
    console.print(table)

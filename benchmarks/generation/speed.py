"""How fast generation is on a CPU: ours, with and without caches, one prompt and many; the authors' loop over
transformers with the same weights; the matrix products of the same steps alone; and llama.cpp, where its Python
package is installed.

    python -m benchmarks.generation.speed

Every variant runs in a process of its own. They take turns, a block each a round, so that whatever else the machine
does hits all alike; medians are reported. The last line is JSON.
"""

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.generation.shapes import SHAPE, TINY_SHAPE, Shape
from benchmarks.generation.speed_worker import (
    AUTHORS,
    BARE,
    BARE_DUAL,
    DUAL,
    LLAMA,
    MANY,
    ONE,
    PREFIX,
    Found,
    measure,
    variants,
    write,
)
from benchmarks.measuring.bars import at_least, at_most, show_bars, time_ratio, verdict
from benchmarks.measuring.machine import commit, cpu_model, prepare_environment
from benchmarks.measuring.processes import MeasuringProcess

_TO_AUTHORS, _DUAL_TO_AUTHORS, _TO_BARE = 3.0, 12.0, 1.25


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each text; it has 4.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of a block of 32; a divisor of it.")] = SHAPE.steps,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; default: the cores.")] = os.cpu_count() or 1,
    tiny: Annotated[bool, typer.Option("--tiny", help="A miniature, to try the script.")] = False,
) -> None:
    """Measure generation: tokens/s, CPU seconds a token, peak memory, equal tokens.

    Example: python -m benchmarks.generation.speed --steps 8 --rounds 4
    """
    shape = TINY_SHAPE if tiny else replace(SHAPE, steps=steps)
    if shape.block_length % shape.steps or rounds > shape.blocks:
        raise typer.BadParameter(f"steps must divide {shape.block_length}, and a text has {shape.blocks} blocks")
    prepare_environment(huge_pages=False)
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    report: dict[str, Any] = {
        "benchmark": "speed",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "settings": {
            **{name: getattr(shape, name) for name in ("prompt", "prompts", "gen_length", "block_length", "steps")},
            "vocab_size": shape.model.vocab_size,
            "tiny": tiny,
        },
    }
    found = _measure_in_turns(console, shape, rounds, threads)
    report["machine"] |= {"load_after": os.getloadavg()[0], "python": platform.python_version()}
    report["machine"] |= found[ONE].environment
    report["results"] = [one.to_json(shape) for one in found.values()]
    report["equal_tokens"] = _equal_tokens(found, shape)
    report |= verdict(_bars(found, report["equal_tokens"], shape))
    _show(console, report)
    show_bars(console, report["bars"])
    print(json.dumps(report))


def _measure_in_turns(console: Console, shape: Shape, rounds: int, threads: int) -> dict[str, Found]:
    """Set all up at once, then a block each a round, beginning with another each time."""
    with tempfile.TemporaryDirectory(prefix="illada-bench-") as folder:
        MeasuringProcess("weights", write, shape, Path(folder)).receive()
        processes = [MeasuringProcess(who, measure, who, shape, Path(folder), threads) for who in variants()]
        for process in processes:
            process.receive()
        for number in range(rounds):
            first = number % len(processes)
            for process in processes[first:] + processes[:first]:
                timing = process.ask("block")
                taken = f"{timing.seconds:.2f} s, {timing.cpu_seconds:.2f} CPU s"
                console.print(f"round {number + 1}/{rounds}  {process.name}  {taken}")
        return {process.name: process.finish() for process in processes}


def _equal_tokens(found: dict[str, Found], shape: Shape) -> dict[str, float]:
    """Share of the generated tokens that are those of the authors' loop."""
    (expected,) = found[AUTHORS].texts
    of = {who: found[who].texts[0] for who in (ONE, PREFIX, DUAL, LLAMA) if who in found}
    of[MANY] = found[MANY].texts[shape.prompts.index(shape.prompt)]
    generated = slice(shape.prompt, shape.prompt + len(found[AUTHORS].blocks) * shape.block_length)
    return {who: _share(expected[generated], tokens[generated]) for who, tokens in of.items()}


def _share(expected: Sequence[int], tokens: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(expected, tokens, strict=True)) / len(expected)


def _bars(found: dict[str, Found], equal: dict[str, float], shape: Shape) -> dict[str, dict[str, Any]]:
    def ratio(slower: str, faster: str, per: int = 1) -> tuple[float, dict[str, float]]:
        wall, cpu = time_ratio(found[slower].blocks, found[faster].blocks)
        return wall / per, {"cpu_seconds_ratio": cpu / per}

    def bar(kind: Any, limit: float, of: tuple[float, dict[str, float]]) -> dict[str, Any]:
        return kind(limit, of[0], **of[1])

    return {
        f"{ONE}: equal tokens": at_least(1.0, equal[ONE]),
        f"{MANY}: equal tokens": at_least(1.0, equal[MANY]),
        f"{AUTHORS} / {ONE}: seconds": bar(at_least, _TO_AUTHORS, ratio(AUTHORS, ONE)),
        f"{MANY} / {ONE}: seconds a token": bar(at_most, 1.0, ratio(MANY, ONE, per=len(shape.prompts))),
        f"{AUTHORS} / {DUAL}: seconds": bar(at_least, _DUAL_TO_AUTHORS, ratio(AUTHORS, DUAL)),
        f"{ONE} / {BARE}: seconds": bar(at_most, _TO_BARE, ratio(ONE, BARE)),
        f"{DUAL} / {BARE_DUAL}: seconds": bar(at_most, _TO_BARE, ratio(DUAL, BARE_DUAL)),
    }


def _show(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="Generation (medians of blocks)", title_justify="left")
    for heading in ("", "tokens/s", "CPU ms/token", "step ms", "peak memory GiB", "equal tokens"):
        table.add_column(heading, justify="right" if heading else "left")
    for result in report["results"]:
        equal = report["equal_tokens"].get(result["who"])
        table.add_row(
            result["who"],
            f"{result['tokens_per_second']:.2f}",
            f"{1e3 * result['cpu_seconds_per_token']:.1f}",
            f"{1e3 * result['step_seconds']:.0f}",
            f"{result['peak_memory_bytes'] / 2**30:.2f}",
            "" if equal is None else f"{100 * equal:.1f} %",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

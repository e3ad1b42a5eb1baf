"""`illada runs`: configurations and curves of several runs, side by side."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from illada_megatron.runs.comparison import Row, compared
from illada_megatron.runs.fields import differing
from illada_megatron.runs.picture import draw
from illada_megatron.runs.records import RunRecord, read_run
from illada_megatron.system.console import made_console
from illada_megatron.system.terminal import say

_NOTHING = "-"


def runs(
    places: Annotated[list[str], typer.Argument(help="Folders of runs (run_dir), or their logging.jsonl_path.")],
    by: Annotated[Literal["steps", "tokens"], typer.Option(help="Where figures are compared.")] = "steps",
    rows: Annotated[int, typer.Option(min=1, help="Of the table.")] = 10,
    png: Annotated[Path | None, typer.Option(help="Draw the curves into this file; needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON object on stdout.")] = False,
) -> None:
    """Compare runs: the fields in which their configurations differ, losses, held-out bounds, throughput.

    `illada runs runs/a runs/b --by tokens --png curves.png`
    """
    found = [read_run(place) for place in places]
    configured = [run for run in found if run.configuration is not None]
    fields = differing([run.configuration or {} for run in configured])
    table = compared(found, by, rows)
    if as_json:
        say(json.dumps(_as_json(found, configured, fields, by, table)))
    else:
        screen = made_console()
        for run in found:
            if run.configuration is None:
                say(f"{run.name}: no configuration lies beside its log")
        if len(configured) > 1:
            screen.print(_fields_table(configured, fields) if fields else "the configurations are the same")
        screen.print(_figures_table(found, by, table))
    if png is not None:
        draw(found, by, png)
        if not as_json:
            say(f"curves: {png}")


def _fields_table(configured: list[RunRecord], fields: dict[str, list[Any]]) -> Table:
    table = Table("differs", *(run.name for run in configured))
    for name, values in fields.items():
        table.add_row(name, *("null" if value is None else str(value) for value in values))
    return table


def _figures_table(found: list[RunRecord], by: str, rows: list[Row]) -> Table:
    """A column a run for each figure, without figures that no run has."""
    kinds = [
        ("loss", [row.loss for row in rows], "{:.4f}"),
        ("held out", [row.held_out for row in rows], "{:.4f}"),
        ("tokens/s", [row.throughput for row in rows], "{:,.0f}"),
    ]
    kinds = [kind for kind in kinds if any(value is not None for values in kind[1] for value in values)]
    table = Table(by)
    for name, _, _ in kinds:
        for run in found:
            table.add_column(f"{name}\n{run.name}", justify="right")
    for number, row in enumerate(rows):
        cells = [
            _NOTHING if value is None else form.format(value) for _, values, form in kinds for value in values[number]
        ]
        table.add_row(f"{row.at:,}", *cells)
    return table


def _as_json(
    found: list[RunRecord], configured: list[RunRecord], fields: dict[str, list[Any]], by: str, table: list[Row]
) -> dict[str, Any]:
    return {
        "runs": [
            {
                "name": run.name,
                "last_step": run.last_step,
                "consumed_tokens": run.consumed_tokens,
                "starts": run.starts,
                "curves": {name: asdict(getattr(run, name)) for name in ("loss", "held_out", "throughput")},
            }
            for run in found
        ],
        "differs": {
            name: dict(zip((run.name for run in configured), values, strict=True)) for name, values in fields.items()
        },
        "by": by,
        "rows": [asdict(row) for row in table],
    }

"""`illada plan`: what a run would do, computed before it is started."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from illada_megatron.cli.plan_layouts import Asked, show_layouts
from illada_megatron.cli.run_commands import ConfigOption, Overrides
from illada_megatron.config import ConfigError, load_config
from illada_megatron.planning import (
    FaultModel,
    Measured,
    PlanError,
    best_interval,
    daly_interval,
    expected_goodput,
    load_device,
    measured_in,
    simulate,
    young_interval,
)
from illada_megatron.system.console import made_console

# 1,024 GPUs are interrupted about every two days, 16,384 every three hours: both are 49,152 GPU hours. Llama 3 405B had
# 419 unexpected interruptions in 54 days on 16,384 GPUs, one in 50,700 GPU hours (arXiv 2407.21783, section 3.3.4).
_GPU_MTBF_HOURS = 49_152.0
_HOUR, _DAY = 3600.0, 86400.0
_SWEEP = 60


_LAYOUTS, _FAILURES, _GOODPUT = "With --config", "With --failures", "Goodput, with both"
# In which mode alone a parameter of `plan` says something.
_ONLY_WITH = {
    "--config": ("overrides", "device", "precision", "top", "explain", "as_json"),
    "--failures": ("fewer", "gpus_per_node", "days", "seed"),
}
# Of a save and a restart where nothing says more; the layouts' table names them.
_STALL, _SAVE, _RESTART = 1.0, 30.0, 180.0


def plan(
    context: typer.Context,
    overrides: Overrides = None,
    config: ConfigOption = None,
    failures: Annotated[
        bool, typer.Option("--failures", help="Instead: goodput and the best checkpoint interval under failures.")
    ] = False,
    gpus: Annotated[
        list[int] | None,
        typer.Option(help="Size of the run; repeat for several. 1,024; of --failures 16,384 too."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="h100, h200, b200, or a YAML file like theirs.", rich_help_panel=_LAYOUTS)
    ] = "h100",
    precision: Annotated[
        list[str] | None,
        typer.Option(help="bf16 or fp8; repeat for several. Both.", rich_help_panel=_LAYOUTS),
    ] = None,
    top: Annotated[int, typer.Option(help="Show so many.", min=1, rich_help_panel=_LAYOUTS)] = 20,
    explain: Annotated[
        int | None,
        typer.Option(
            help="Show the arithmetic of this one of the list, line by line; 0: of the configuration's own layout.",
            min=0,
            rich_help_panel=_LAYOUTS,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="All layouts as a line of JSON.", rich_help_panel=_LAYOUTS)
    ] = False,
    log: Annotated[
        Path | None,
        typer.Option(
            help="A run's logging.jsonl_path: medians of what is measured there, where no option says more.",
            rich_help_panel=_GOODPUT,
        ),
    ] = None,
    save_stall: Annotated[
        float | None, typer.Option(help="Seconds that a save makes the run wait.", rich_help_panel=_GOODPUT)
    ] = None,
    save: Annotated[
        float | None,
        typer.Option(help="Seconds from its begin until the checkpoint is durable.", rich_help_panel=_GOODPUT),
    ] = None,
    restart: Annotated[
        float | None,
        typer.Option(help="Seconds from the start of the ranks to the first new step.", rich_help_panel=_GOODPUT),
    ] = None,
    detect: Annotated[float, typer.Option(help="Seconds until a failure is noticed.", rich_help_panel=_GOODPUT)] = 60.0,
    replacement: Annotated[
        float,
        typer.Option(help="Seconds until a lost machine is replaced; 0: a spare is ready.", rich_help_panel=_GOODPUT),
    ] = 0.0,
    fewer: Annotated[
        bool,
        typer.Option(
            "--fewer",
            help="Train on the machines that are left until then, instead of waiting.",
            rich_help_panel=_FAILURES,
        ),
    ] = False,
    gpu_mtbf_hours: Annotated[
        float,
        typer.Option(
            help="Mean hours between failures of a GPU; 49,152: 1,024 GPUs fail every two days.",
            rich_help_panel=_GOODPUT,
        ),
    ] = _GPU_MTBF_HOURS,
    gpus_per_node: Annotated[
        int, typer.Option(help="What a failure takes away with --fewer.", rich_help_panel=_FAILURES)
    ] = 8,
    days: Annotated[float, typer.Option(help="Simulated wall time.", rich_help_panel=_FAILURES)] = 365.0,
    seed: Annotated[int, typer.Option(help="Of the simulated failures.", rich_help_panel=_FAILURES)] = 0,
) -> None:
    """Say before it is started what a run would do.

    With --config: every layout that fits on so many GPUs, the fastest first, with its memory, bubble, communication,
    speed and days (docs/scaling.md): `illada plan --config illada-8b --gpus 1024 --device h100`

    With --failures: a simulation of a run of GPUs that fail, and the checkpoint interval that keeps most of its time;
    Young's and Daly's formulas beside it (docs/faults.md): `illada plan --failures --log runs/illada_8b/steps.jsonl`
    """
    if failures == (config is not None):
        raise ConfigError("say what to plan: --config for its layouts, or --failures")
    _refuse_the_others(context, "--failures" if failures else "--config")
    measured = measured_in(log) if log is not None else Measured(None, None, None, None)
    assumed = (None, None, None) if failures else (_STALL, _SAVE, _RESTART)
    stall = _given("--save-stall", "save_stall_seconds", save_stall, measured.save_stall_seconds, log, assumed[0])
    durable = _given("--save", "save_seconds", save, measured.save_seconds, log, assumed[1])
    start = _given("--restart", "start_seconds", restart, measured.restart_seconds, log, assumed[2])
    if not days > 0:
        raise ConfigError(f"--days {days}: expected a positive number")
    for count in gpus or ([1024, 16384] if failures else [1024]):
        try:
            model = FaultModel(
                gpus=count,
                gpu_mtbf_seconds=gpu_mtbf_hours * _HOUR,
                save_stall_seconds=stall,
                save_seconds=durable,
                detect_seconds=detect,
                restart_seconds=start,
                replacement_seconds=replacement,
                goes_on_with_fewer=fewer,
                gpus_per_node=gpus_per_node,
            )
        except ValueError as error:
            raise PlanError(str(error)) from error
        if failures:
            made_console().print(_table(model, days * _DAY, seed, measured.step_seconds))
        else:
            asked = Asked(_precisions(precision), top, explain, as_json)
            show_layouts(load_config(config, overrides or ()), model, load_device(device), asked)


def _refuse_the_others(context: typer.Context, mode: str) -> None:
    """What was given and would be ignored."""
    for other, names in _ONLY_WITH.items():
        sources = {one: context.get_parameter_source(one) for one in names}
        given = [one for one, source in sources.items() if source is not None and source.name != "DEFAULT"]
        if other != mode and given:
            option = {one.name: one.opts[0] for one in context.command.params}[given[0]]
            why = {
                "--failures": "goodput is that of a run which waits for machines of the size in --device's file",
                "--config": "no layout is looked for",
            }[other]
            raise ConfigError(f"{option}: no use with {mode} ({why}); leave it out, or plan with {other}")


def _precisions(given: list[str] | None) -> list[str]:
    for one in given or ():
        if one not in ("bf16", "fp8"):
            raise ConfigError(f"--precision {one}: expected bf16 or fp8")
    return given or ["bf16", "fp8"]


def _given(
    option: str, key: str, value: float | None, measured: float | None, log: Path | None, assumed: float | None
) -> float:
    if value is not None:
        return value
    if measured is None and assumed is not None:
        return assumed
    if measured is None:
        where = f"{log} has no {key}: give {option} SECONDS" if log else f"give {option} SECONDS, or --log"
        raise ConfigError(f"{option} is not known: {where}")
    return measured


def _table(model: FaultModel, wall_seconds: float, seed: int, step_seconds: float | None) -> Table:
    """Young's, Daly's and the best interval of a sweep, and where the time goes with each."""
    mtbf, stall = model.mtbf_seconds, model.save_stall_seconds
    # with a stall near 0 the formulas want saves one after another; a save has to be durable before the next
    shortest = max(stall, model.save_seconds, 1.0)
    rows = {
        "Young 1974": max(young_interval(stall, mtbf), shortest),
        "Daly 2006": max(daly_interval(stall, mtbf), shortest),
    }
    sweep = np.geomspace(shortest, max(20 * rows["Daly 2006"], 2 * shortest), _SWEEP).tolist()
    rows[f"best of {_SWEEP + 2}, simulated"], _ = best_interval(model, wall_seconds, seed, [*rows.values(), *sweep])
    wait = (
        f"trains on without a lost machine for {model.replacement_seconds:,.0f} s"
        if model.goes_on_with_fewer
        else f"waits {model.replacement_seconds:,.0f} s for another machine"
    )
    table = Table(
        title=f"{model.gpus:,} GPUs, a failure every {mtbf / _HOUR:,.2f} h; {wall_seconds / _DAY:,.0f} days simulated\n"
        f"a save: the run waits {stall:.2f} s, durable after {model.save_seconds:,.1f} s; a failure: noticed after "
        f"{model.detect_seconds:,.0f} s, {wait}, starts in {model.restart_seconds:,.0f} s",
        title_justify="left",
    )
    for name in ("interval", "", "goodput expected", "simulated", "saving", "repeated", "down", "fewer", "failures"):
        table.add_column(name, justify="left" if name == "interval" else "right")
    for name, interval in rows.items():
        run = simulate(model, interval, wall_seconds, seed)
        steps = f" = {max(1, round(interval / step_seconds)):,} steps" if step_seconds else ""
        expected = "-" if model.goes_on_with_fewer else f"{expected_goodput(model, interval):.2%}"
        shares = [run.goodput, run.saving, run.repeated, run.down, run.fewer]
        table.add_row(
            name, f"{interval:,.0f} s{steps}", expected, *(f"{one:.2%}" for one in shares), f"{run.failures:,}"
        )
    return table

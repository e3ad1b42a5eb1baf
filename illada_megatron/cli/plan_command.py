"""`illada plan`: what a run would do, computed before it is started."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from illada_megatron.config import ConfigError
from illada_megatron.planning import (
    FaultModel,
    Measured,
    PlanError,
    best_interval,
    daly_interval,
    expected_goodput,
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


def plan(
    failures: Annotated[
        bool, typer.Option("--failures", help="Goodput and the best checkpoint interval under failures.")
    ] = False,
    gpus: Annotated[list[int], typer.Option(help="Size of the run; repeat for several.")] = [1024, 16384],  # noqa: B006
    log: Annotated[
        Path | None,
        typer.Option(help="A run's logging.jsonl_path: medians of what is measured there, where no option says more."),
    ] = None,
    save_stall: Annotated[float | None, typer.Option(help="Seconds that a save makes the run wait.")] = None,
    save: Annotated[float | None, typer.Option(help="Seconds from its begin until the checkpoint is durable.")] = None,
    restart: Annotated[
        float | None, typer.Option(help="Seconds from the start of the ranks to the first new step.")
    ] = None,
    detect: Annotated[float, typer.Option(help="Seconds until a failure is noticed.")] = 60.0,
    replacement: Annotated[
        float, typer.Option(help="Seconds until a lost machine is replaced; 0: a spare is ready.")
    ] = 0.0,
    fewer: Annotated[
        bool, typer.Option("--fewer", help="Train on the machines that are left until then, instead of waiting.")
    ] = False,
    gpu_mtbf_hours: Annotated[
        float, typer.Option(help="Mean hours between failures of a GPU; 49,152: 1,024 GPUs fail every two days.")
    ] = _GPU_MTBF_HOURS,
    gpus_per_node: Annotated[int, typer.Option(help="What a failure takes away with --fewer.")] = 8,
    days: Annotated[float, typer.Option(help="Simulated wall time.")] = 365.0,
    seed: Annotated[int, typer.Option(help="Of the simulated failures.")] = 0,
) -> None:
    """Simulate a run of many GPUs that fail, and find the checkpoint interval that keeps most of its time; Young's and
    Daly's formulas beside it. docs/faults.md has the model.

    `illada plan --failures --log runs/illada_8b/steps.jsonl --detect 90 --restart 240`
    """
    if not failures:
        raise ConfigError("say what to plan: --failures")
    measured = measured_in(log) if log is not None else Measured(None, None, None, None)
    stall = _given("--save-stall", "save_stall_seconds", save_stall, measured.save_stall_seconds, log)
    durable = _given("--save", "save_seconds", save, measured.save_seconds, log)
    start = _given("--restart", "start_seconds", restart, measured.restart_seconds, log)
    if not days > 0:
        raise ConfigError(f"--days {days}: expected a positive number")
    screen = made_console()
    for count in gpus:
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
        screen.print(_table(model, days * _DAY, seed, measured.step_seconds))


def _given(option: str, key: str, value: float | None, measured: float | None, log: Path | None) -> float:
    if value is not None:
        return value
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

"""`illada plan --config`: layouts that fit, the fastest first."""

import json
from dataclasses import dataclass
from typing import Any

import typer
from rich import box
from rich.table import Table

from illada_megatron.config import RunConfig
from illada_megatron.config.layout import choose_layout, pipeline_split
from illada_megatron.planning import (
    MEMORY_COLUMNS,
    MEMORY_SHARE,
    Candidate,
    Device,
    FaultModel,
    PlanError,
    Planned,
    Workload,
    as_json,
    explained,
    fp8_refusal,
    layout_words,
    memory_gib,
    planned,
    planned_goodput,
    search,
    smallest,
    stage_layers,
    workload,
)
from illada_megatron.system.console import made_console
from illada_megatron.system.terminal import say

_GIB = 2**30
_TABLE_WIDTH = 200  # lines that a narrow terminal breaks are read more easily than columns without numbers


@dataclass(frozen=True)
class Asked:
    """What the options say of the layouts."""

    precisions: list[str]
    top: int
    explain: int | None
    """Which of the list, from 1; 0: the configuration's own."""
    as_json: bool


def show_layouts(config: RunConfig, faults: FaultModel, device: Device, asked: Asked) -> None:
    """Of one number of GPUs."""
    work, gpus = workload(config), faults.gpus
    if "fp8" in asked.precisions and work.fp8.recipe not in device.fp8_recipes:
        raise PlanError(
            f"FP8's recipe {work.fp8.recipe}: {device.name} has {', '.join(device.fp8_recipes)}; change it, or ask for "
            "--precision bf16"
        )
    found = search(work, gpus, device, asked.precisions)
    interval, goodput = planned_goodput(faults)
    own, problem = own_layout(config, work, gpus, device)
    if asked.as_json:
        layouts = [as_json(work, one, goodput) for one in found]
        typer.echo(
            json.dumps({"gpus": gpus, "device": device.name, "save_interval_seconds": interval, "layouts": layouts})
        )
        return
    if asked.explain is not None:
        _explain(work, _asked_for(found, own, problem, asked.explain), device, goodput)
        return
    say(
        f"{gpus:,} x {device.name}, {work.model.num_parameters:,} parameters, {work.global_batch_size:,} sequences of "
        f"{work.sequence_length:,}: {len(found):,} layouts fit into {MEMORY_SHARE:.0%} of "
        f"{device.memory_bytes.value / _GIB:.1f} GiB"
    )
    say(
        f"goodput {goodput:.2%}: a failure every {faults.mtbf_seconds / 3600:,.1f} h, down "
        f"{faults.outage_seconds:g} s; a save every {interval:,.0f} s, waited for {faults.save_stall_seconds:g} s, "
        f"durable after {faults.save_seconds:g} s"
    )
    if not found:
        say(_nothing_fits(work, gpus, device, asked.precisions))
        return
    made_console(width=_TABLE_WIDTH).print(_table(work, found[: asked.top], goodput))
    say(_own_text(found, own, problem, device))


def own_layout(config: RunConfig, work: Workload, gpus: int, device: Device) -> tuple[Planned | None, str]:
    """The configuration's layout on so many GPUs; None with the reason where there is none."""
    if config.training.precision == "fp32":
        return None, "training.precision fp32 is for CPUs, and not planned"
    try:
        chosen = choose_layout(config, gpus)
    except ValueError as error:
        return None, str(error)
    config, layout = chosen.config, chosen.layout
    training = config.training
    split = stage_layers(pipeline_split(config))
    one = Candidate(
        *(gpus, layout.tensor, layout.pipeline, layout.virtual, layout.context),
        *(training.micro_batch_size, training.recompute, training.precision, split, config.parallel.pipeline_layout),
    )
    return planned(work, one, device), ""


def _asked_for(found: list[Planned], own: Planned | None, problem: str, number: int) -> Planned:
    if number == 0:
        if own is None:
            raise PlanError(f"--explain 0: the configuration has no layout here: {problem}")
        return own
    if number > len(found):
        raise PlanError(f"--explain {number}: {len(found)} layouts fit; 0 is the configuration's own")
    return found[number - 1]


def _explain(work: Workload, one: Planned, device: Device, goodput: float) -> None:
    lines = explained(work, one, device)
    lines.append(("", f"{one.days / goodput:,.1f} days with a goodput of {goodput:.2%}"))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        say(f"{name:{width}}  {text}" if name else f"\n{text}")


def _nothing_fits(work: Workload, gpus: int, device: Device, precisions: list[str]) -> str:
    least = smallest(work, gpus, device, precisions)
    if least is None:
        if refusal := fp8_refusal(work, gpus, device):
            return f"no layout in FP8: {refusal}"
        return (
            f"no layout divides the batch of {work.global_batch_size:,} over {gpus:,} GPUs: change "
            "training.global_batch_size or --gpus"
        )
    one, needed = least
    return (
        f"no layout fits: the smallest, {layout_words(one)} with {one.precision} and recompute {one.recompute}, needs "
        f"{needed.total / _GIB:,.1f} GiB a GPU; take more GPUs"
    )


def _own_text(found: list[Planned], own: Planned | None, problem: str, device: Device) -> str:
    if own is None:
        return f"the configuration's own layout: {problem}"
    places = [number for number, one in enumerate(found, 1) if one.candidate == own.candidate]
    words = f"the configuration's own, {layout_words(own.candidate)} with {own.candidate.precision}"
    if places:
        speed = own.tokens_per_second / found[0].tokens_per_second
        return f"{words}: number {places[0]}, {speed:.0%} of the first's speed"
    share = own.memory.total / device.memory_bytes.value
    return (
        f"{words} and recompute {own.candidate.recompute}: {own.tokens_per_second:,.0f} tokens/s/GPU, "
        f"{own.memory.total / _GIB:.1f} GiB ({share:.0%}); `--explain 0` has its arithmetic"
    )


def _table(work: Workload, found: list[Planned], goodput: float) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    left = ("", "layout", "recompute")
    names = (
        "",
        "layout",
        "micro",
        "recompute",
        "",
        "tokens/s/GPU",
        "MFU",
        "days",
        "bubble",
        "sent GB",
        "hidden",
        "GiB",
    )
    for name in (*names, *MEMORY_COLUMNS):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for number, one in enumerate(found, 1):
        table.add_row(*_row(work, number, one, goodput))
    return table


def _row(work: Workload, number: int, one: Planned, goodput: float) -> list[Any]:
    layout, parts = one.candidate, memory_gib(one)
    return [
        *(
            str(number),
            layout_words(layout),
            f"{layout.microbatches(work.global_batch_size)} x {layout.micro_batch_size}",
        ),
        *(layout.recompute, layout.precision, f"{one.tokens_per_second:,.0f}", f"{one.mfu:.1%}"),
        *(f"{one.days / goodput:,.1f}", f"{one.step.bubble:.1%}", f"{sum(one.step.sent.values()) / 1e9:,.1f}"),
        *(f"{one.step.hidden:.0%}", f"{one.memory.total / _GIB:.1f}"),
        *(f"{parts[name]:.1f}" for name in MEMORY_COLUMNS),
    ]

"""`illada train`, `illada evaluate`, `illada doctor`. What needs torch is imported when a command runs: it takes a
second, and `illada preprocess` has no use for it."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from illada_megatron.config import ConfigError, RunConfig, load_config, preset_names
from illada_megatron.config.layout import choose_layout, layout_rows, resolve_layout
from illada_megatron.config.learning_rate import schedule_rows
from illada_megatron.config.load import to_yaml
from illada_megatron.config.machines import Work, choose_work, layouts_by_nodes
from illada_megatron.system.console import made_console
from illada_megatron.system.terminal import say

if TYPE_CHECKING:
    from illada_megatron.runtime.launch import LaunchOptions

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Fields to change: `section.field=value`, as `training.lr=1e-3`.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help=f"A YAML file, or a preset: {', '.join(preset_names())}."),
]
LAUNCH = "Launch"
_PAD = "training.pad_global_batch=true"
NprocOption = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Start this many ranks on this machine.", rich_help_panel=LAUNCH)
]


def train(
    overrides: Overrides = None,
    config: ConfigOption = None,
    nproc: NprocOption = None,
    nnodes: Annotated[
        str,
        typer.Option(
            help="Machines of the run, each with this command: N, or MIN:MAX to go on with fewer and to take in more.",
            rich_help_panel=LAUNCH,
        ),
    ] = "1",
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(help="HOST:PORT where the machines find each other; HOST is one of them.", rich_help_panel=LAUNCH),
    ] = None,
    rdzv_id: Annotated[str | None, typer.Option(help="The run's name at that place.", rich_help_panel=LAUNCH)] = None,
    rdzv_conf: Annotated[
        str, typer.Option(help="Settings of it, as torchrun's: KEY=VALUE,... (docs/faults.md).", rich_help_panel=LAUNCH)
    ] = "",
    local_addr: Annotated[
        str | None,
        typer.Option(help="Address of this machine, where its host name does not lead to it.", rich_help_panel=LAUNCH),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start failed ranks again this many times.", rich_help_panel=LAUNCH)
    ] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved configuration and the layout (of each number of machines), and stop."
        ),
    ] = False,
) -> None:
    """Train, or continue from the checkpoint in `checkpoint.save_dir`.

    One process: `illada train --config examples/tiny/config.yaml`

    Four ranks of this machine: `illada train --nproc 4 --config examples/tiny/config.yaml
    parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=2`

    Many machines, on each: `illada train --nproc 8 --nnodes 120:128 --rdzv-endpoint HOST:29500 --max-restarts 100
    --config FILE`. Ranks may also be started by torchrun (`-m illada_megatron train ...`) or, one task each, by srun.
    """
    from illada_megatron.runtime import (
        adopt_slurm_rank,
        configured_for,
        end_with_launcher,
        is_rank,
        world_size_from_environment,
    )

    resolved = load_config(config, overrides or ())
    launched = nproc is not None or nnodes != "1"
    launch = _launch_options(nproc, nnodes, rdzv_endpoint, rdzv_id, rdzv_conf, local_addr, max_restarts)
    arguments = sys.argv[1:]
    if launch.min_nodes < launch.max_nodes and resolved.training.pad_global_batch is None:
        arguments.append(_PAD)  # what the ranks decide by is in their configuration
        resolved = load_config(config, [*(overrides or ()), _PAD])
    if not launched and adopt_slurm_rank() and max_restarts:
        raise ConfigError(
            f"--max-restarts {max_restarts}: srun has started this rank, and only srun can start it again; let it "
            "start one launcher a node, with --nproc and --nnodes"
        )
    if launch.max_nodes > 1 and rdzv_endpoint is None and not dry_run:
        raise ConfigError(f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT, where the machines find each other")
    if dry_run:
        _show_dry_run(resolved, launch if launched and not is_rank() else None)
        return
    if not is_rank() and (launch.nproc > 1 or launch.max_nodes > 1 or launch.max_restarts):
        from illada_megatron.runtime.launch import launch_ranks

        _check_launch(resolved, launch)
        launch_ranks(launch, arguments, lambda nodes: choose_work(resolved, launch.nproc, nodes).nodes)
    end_with_launcher()
    from illada_megatron.training import train as run_training

    run_training(configured_for(resolved, world_size_from_environment()))


def evaluate(
    overrides: Overrides = None,
    config: ConfigOption = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A run's checkpoint.save_dir, or one step_... below it.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Of the moving average of the checkpoint's weights.")] = False,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write all figures, and each sample's loss. A command that was killed goes on where it was."
        ),
    ] = None,
    nproc: NprocOption = None,
) -> None:
    """Measure the held-out bound of a checkpoint, or of the initial weights of a configuration: nats/token and, where a
    tokenizer is set, bits/byte, of each held-out text and their mean, each +- its standard error.

    `illada evaluate --checkpoint runs/tiny/checkpoints --json bound.json validation.evaluate_samples=4096`

    Any number of ranks reads a checkpoint of any layout: in that layout where its sizes divide them, else with as much
    of its tensor parallelism as divides them, no stages, the rest data parallel, unless fields say otherwise:
    `illada evaluate --nproc 2 --checkpoint runs/tiny/checkpoints parallel.pipeline_model_parallel_size=2`
    """
    from illada_megatron.runtime import adopt_slurm_rank, end_with_launcher, is_rank

    if (config is None) == (checkpoint is None):
        raise ConfigError("give one of --checkpoint (to evaluate it) and --config (to evaluate its initial weights)")
    if ema and checkpoint is None:
        raise ConfigError("--ema: initial weights have no moving average: give --checkpoint")
    if nproc is not None and nproc > 1 and not is_rank():
        from illada_megatron.runtime.launch import LaunchOptions, launch_ranks

        launch_ranks(LaunchOptions(nproc), sys.argv[1:])
    if nproc is None:
        adopt_slurm_rank()
    end_with_launcher()
    from illada_megatron.training.evaluate import evaluate_checkpoint

    found = evaluate_checkpoint(config, overrides or (), checkpoint, json_path, ema)
    if found is not None:
        from illada_megatron.training.held_out_report import lines, summary

        for note in found.notes:
            say(note)
        say(f"{checkpoint or 'initial weights'}{', EMA' if ema else ''}: held-out bound {summary(found.held_out.mean)}")
        for line in lines(found.held_out):
            say(line)


def doctor() -> None:
    """Show what this machine offers: device, CUDA, Transformer Engine, Apex, and what each would bring."""
    from illada_megatron.runtime import capabilities, runtime
    from illada_megatron.runtime.tables import two_columns

    screen = made_console()
    screen.print(two_columns("installed", [(part.name, part.text()) for part in capabilities()]))
    config = RunConfig()
    with runtime(config) as run:
        from illada_megatron.training.start_table import choice_rows

        screen.print(two_columns("a run would use", choice_rows(config, run.device)))


def _launch_options(
    nproc: int | None,
    nnodes: str,
    rdzv_endpoint: str | None,
    rdzv_id: str | None,
    rdzv_conf: str,
    local_addr: str | None,
    max_restarts: int,
) -> "LaunchOptions":
    """What the command line says of the launch. Raises ConfigError."""
    from illada_megatron.runtime.launch import SHARED_ID, LaunchOptions

    numbers = nnodes.split(":")
    if not all(number.isdecimal() for number in numbers) or len(numbers) > 2:
        raise ConfigError(f"--nnodes {nnodes}: expected N or MIN:MAX")
    least, most = int(numbers[0]), int(numbers[-1])
    if not 1 <= least <= most:
        raise ConfigError(f"--nnodes {nnodes}: expected at least 1, and MIN not above MAX")
    options = LaunchOptions(nproc or 1, least, most, local_addr=local_addr, max_restarts=max_restarts)
    if rdzv_endpoint is None:
        return options
    pairs = [part.partition("=") for part in rdzv_conf.split(",") if part]
    if any(not value for _, _, value in pairs):
        raise ConfigError(f"--rdzv-conf {rdzv_conf}: expected KEY=VALUE,KEY=VALUE")
    settings = {key.strip(): value.strip() for key, _, value in pairs}
    return replace(options, rdzv_endpoint=rdzv_endpoint, rdzv_id=rdzv_id or SHARED_ID, rdzv_conf=settings)


def _check_launch(config: RunConfig, launch: "LaunchOptions") -> Work:
    """What the run does on all its machines. Raises ConfigError where no layout fits: before anything is started."""
    try:
        if launch.min_nodes < launch.max_nodes:
            return choose_work(config, launch.nproc, launch.max_nodes)
        return Work(launch.max_nodes, choose_layout(config, launch.nproc * launch.max_nodes))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _show_dry_run(config: RunConfig, launch: "LaunchOptions | None") -> None:
    from illada_megatron.runtime import configured_for, count_groups, select_device, world_size_from_environment
    from illada_megatron.runtime.tables import two_columns

    if launch is None:
        world_size = world_size_from_environment()
        chosen = configured_for(config, world_size)
    else:
        work = _check_launch(config, launch).chosen
        world_size, chosen = work.layout.world_size, work.config
    say(to_yaml(chosen).rstrip("\n"))
    screen = made_console()
    layout = resolve_layout(chosen, world_size)
    screen.print(two_columns("layout", layout_rows(chosen, layout)))
    screen.print(two_columns("process groups", count_groups(layout).rows()))
    screen.print(two_columns("schedule", schedule_rows(chosen)))
    if launch and launch.min_nodes < launch.max_nodes:
        rows = layouts_by_nodes(config, launch.nproc, launch.min_nodes, launch.max_nodes)
        screen.print(two_columns("layout by machines", rows))
    select_device(config)

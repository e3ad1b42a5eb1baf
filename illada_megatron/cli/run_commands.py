"""`illada train`, `illada evaluate`, `illada doctor`. What needs torch is imported when a command runs: it takes a
second, and `illada preprocess` has no use for it."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.config.layout import Layout, layout_rows, resolve_layout
from illada_megatron.config.load import to_yaml

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Fields to change: `section.field=value`, as `training.lr=1e-3`.")
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="A YAML file, or a preset: tiny, illada-8b, llada-8b, illada-70b.")
]
NprocOption = Annotated[int | None, typer.Option("--nproc", help="Start this many ranks on this machine.")]


def train(
    overrides: Overrides = None,
    config: ConfigOption = None,
    nproc: NprocOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and the layout, and stop.")
    ] = False,
) -> None:
    """Train, or continue from the checkpoint in `checkpoint.save_dir`.

    One process: `illada train --config examples/tiny/config.yaml`

    Four ranks of this machine: `illada train --nproc 4 --config examples/tiny/config.yaml
    parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=2`

    Many machines: `python -m torch.distributed.run --nnodes N --nproc-per-node 8 --rdzv-backend c10d
    --rdzv-endpoint HOST:PORT -m illada_megatron train --config FILE`
    """
    from illada_megatron.runtime import is_rank, world_size_from_environment
    from illada_megatron.runtime.launch import launch_ranks

    resolved = load_config(config, overrides or ())
    world_size = nproc if nproc and not is_rank() else world_size_from_environment()
    if dry_run:
        _show_dry_run(resolved, world_size)
        return
    if _to_launch(nproc):
        _check_layout(resolved, world_size)
        launch_ranks(world_size, sys.argv[1:])
        return
    from illada_megatron.training import train as run_training

    run_training(resolved)


def evaluate(
    overrides: Overrides = None,
    config: ConfigOption = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A run's checkpoint.save_dir, or one step_... below it.")
    ] = None,
    nproc: NprocOption = None,
) -> None:
    """Measure the held-out bound (nats/token) of a checkpoint, or of the initial weights of a configuration.

    `illada evaluate --checkpoint runs/tiny/checkpoints validation.num_samples=256`

    On several ranks the layout is the checkpoint's, unless fields change it: `illada evaluate --nproc 2 --checkpoint
    runs/tiny/checkpoints parallel.tensor_model_parallel_size=1 parallel.pipeline_model_parallel_size=1`
    """
    if (config is None) == (checkpoint is None):
        raise ConfigError("give one of --checkpoint (to evaluate it) and --config (to evaluate its initial weights)")
    if _to_launch(nproc):
        from illada_megatron.runtime.launch import launch_ranks

        launch_ranks(nproc or 1, sys.argv[1:])
        return
    from illada_megatron.training.evaluate import evaluate_checkpoint

    figures = evaluate_checkpoint(config, overrides or (), checkpoint)
    if figures is not None:
        print(
            f"{checkpoint or 'initial weights'}: held-out bound {figures.bound:.4f} nats/token, "
            f"masked CE {figures.masked_cross_entropy:.4f} nats, over {figures.num_tokens:,} tokens"
        )


def doctor() -> None:
    """Show what this machine offers: device, CUDA, Transformer Engine, Apex, and what each would bring."""
    from illada_megatron.runtime import capabilities, runtime
    from illada_megatron.runtime.tables import two_columns

    console = Console(highlight=False)
    rows = [
        (part.name, f"{part.found}" if part.found else f"missing: would bring {part.brings}") for part in capabilities()
    ]
    console.print(two_columns("installed", rows))
    config = RunConfig()
    with runtime(config) as run:
        from illada_megatron.training.start_table import choice_rows

        console.print(two_columns("a run would use", choice_rows(config, run.device)))


def _to_launch(nproc: int | None) -> bool:
    """Whether this process has to start the ranks: they run the same command, and are ranks already."""
    from illada_megatron.runtime import is_rank

    return nproc is not None and nproc > 1 and not is_rank()


def _show_dry_run(config: RunConfig, world_size: int) -> None:
    from illada_megatron.runtime import select_device
    from illada_megatron.runtime.tables import two_columns

    layout = _check_layout(config, world_size)
    print(to_yaml(config), end="")
    Console(highlight=False).print(two_columns("layout", layout_rows(config, layout)))
    select_device(config)


def _check_layout(config: RunConfig, world_size: int) -> Layout:
    try:
        return resolve_layout(config, world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error

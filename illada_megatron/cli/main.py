"""`illada`: train, evaluate, generate, preprocess, doctor."""

import os
import sys
import warnings

import typer

from illada_megatron.cli import preprocess_command
from illada_megatron.data.errors import DataError


def _commands(asked_for: str | None) -> typer.Typer:
    """All commands. Preparing a corpus needs no torch, nor the second and the 150 MB that it takes: where that is asked
    for, it is the only one."""
    app = typer.Typer(
        help="Train, evaluate and run iLLaDA, a masked-diffusion language model with bidirectional attention, "
        "in tensor, pipeline and data parallel.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    app.callback()(_no_options)  # or else an only command would have no name
    if asked_for == "preprocess":
        app.command()(preprocess_command.preprocess)
        return app
    from illada_megatron.cli import generate_command, run_commands

    app.command()(run_commands.train)
    app.command()(run_commands.evaluate)
    app.command()(generate_command.generate)
    app.command()(preprocess_command.preprocess)
    app.command()(run_commands.doctor)
    return app


def _no_options() -> None:
    pass


def _user_errors() -> tuple[type[Exception], ...]:
    """What users can mend: shown as a message. Anything else is a defect and keeps its traceback."""
    from illada_megatron.checkpoint.store import CheckpointError
    from illada_megatron.config import ConfigError

    return ConfigError, CheckpointError, DataError, FloatingPointError, OSError


def main() -> None:
    """Entry point; exits with 2 on what the user can mend."""
    # The start-up table says once what is missing; megatron-core warns at every import of it, in every rank. Commands
    # import it only when they run, so that this comes first.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        _commands(sys.argv[1] if len(sys.argv) > 1 else None)()
    except _user_errors() as error:
        from illada_megatron.config import ConfigError

        rank = os.environ.get("RANK")
        if rank in (None, "0") or not isinstance(error, ConfigError):  # a wrong configuration is wrong on every rank
            where = f" (rank {rank})" if rank is not None else ""
            print(f"illada: error{where}: {error}", file=sys.stderr)
        sys.exit(2)

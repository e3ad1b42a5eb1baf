"""`illada`: train, evaluate, generate, sample, preprocess, checkpoint, convert, plan, doctor."""

import os
import socket
import sys
import warnings
from contextlib import suppress

import typer

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.cli import (
    checkpoint_commands,
    convert_command,
    generate_command,
    plan_command,
    preprocess_command,
    run_commands,
    sample_command,
)
from illada_megatron.config import ConfigError
from illada_megatron.data.errors import DataError
from illada_megatron.planning import PlanError
from illada_megatron.system.terminal import say, show_defect

# What users can mend: shown as a message. Anything else is a defect and keeps its traceback.
_USER_ERRORS = (ConfigError, CheckpointError, DataError, FloatingPointError, PlanError, OSError)
# Of the errors of the system, those that another attempt would meet again; a disk or a network may come back.
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)

app = typer.Typer(
    help="Train, evaluate and run iLLaDA, a masked-diffusion language model with bidirectional attention, "
    "in tensor, pipeline and data parallel.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(run_commands.train)
app.command()(run_commands.evaluate)
app.command()(generate_command.generate)
app.command()(preprocess_command.preprocess)
app.command()(sample_command.sample)
app.command()(plan_command.plan)
app.command()(run_commands.doctor)
app.add_typer(checkpoint_commands.app, name="checkpoint")
app.add_typer(convert_command.app, name="convert")


def main() -> None:
    """Entry point; exits with 2 on what the user can mend, which the launcher does not try again, with 1 on errors of
    the system that may pass."""
    # The start-up table says once what is missing; megatron-core warns at every import of it, in every rank. Commands
    # import it only when they run, so that this comes first.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    sys.excepthook = show_defect
    try:
        app()
    except _USER_ERRORS as error:
        rank = os.environ.get("RANK")
        # Sums over all ranks have found that a loss is bad, so that all say the same. Of nothing else is that known: a
        # file, a disk or a configuration may be another on one machine, and that one's word is what explains the run's
        # end.
        if rank in (None, "0") or not isinstance(error, FloatingPointError):
            where = f" (rank {rank} on {socket.gethostname()})" if rank is not None else ""
            with suppress(OSError):  # a full disk or a closed terminal changes no exit code
                say(f"illada: error{where}: {error}", error=True)
        sys.exit(1 if isinstance(error, OSError) and not isinstance(error, _LASTING) else 2)

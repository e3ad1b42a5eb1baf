"""`illada`: train, evaluate, generate, serve, preprocess, tokenizer, sample, runs, plan, translate, doctor,
checkpoint, convert; and how it, and the programs of tools/, end."""

import os
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

import typer

from illada_megatron.cli.megatrons_habits import MegatronsHabits, converter_words, tool_app
from illada_megatron.system.terminal import say, show_defect

# Command -> module of this folder and what it is there; in the order of the help.
_COMMANDS = {
    "train": ("run_commands", "train"),
    "evaluate": ("run_commands", "evaluate"),
    "generate": ("generate_command", "generate"),
    "serve": ("serve_command", "serve"),
    "preprocess": ("preprocess_command", "preprocess"),
    "tokenizer": ("tokenizer_command", "app"),
    "sample": ("sample_command", "sample"),
    "runs": ("runs_command", "runs"),
    "plan": ("plan_command", "plan"),
    "translate": ("translate_command", "translate_command"),
    "doctor": ("run_commands", "doctor"),
    "checkpoint": ("checkpoint_commands", "app"),
    "convert": ("convert_command", "app"),
}
# Of the errors of the system, those that another attempt would meet again; a disk or a network may come back.
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


def _made_app(names: list[str]) -> typer.Typer:
    app = typer.Typer(
        help="Train, evaluate and run iLLaDA, a masked-diffusion language model with bidirectional attention, "
        "in tensor, pipeline and data parallel.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    app.callback()(lambda: None)  # a program of one command would not be asked for it by name
    for name in names:
        module, attribute = _COMMANDS[name]
        command = getattr(import_module(f"illada_megatron.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            # another program's options are the words that `translate` is about
            settings = {"ignore_unknown_options": name == "translate"}
            app.command(name, cls=MegatronsHabits, context_settings=settings)(command)
    return app


def _user_errors() -> tuple[type[Exception], ...]:
    """What users can mend: shown as a message. Anything else is a defect and keeps its traceback."""
    from illada_megatron.checkpoint.files.errors import CheckpointError
    from illada_megatron.config import ConfigError
    from illada_megatron.data.errors import DataError
    from illada_megatron.planning import PlanError
    from illada_megatron.runs.records import RunError

    return ConfigError, CheckpointError, DataError, FloatingPointError, PlanError, RunError, OSError


def main() -> None:
    """Entry point; exits with 2 on what the user can mend, which the launcher does not try again, with 3 on what ends
    the run on all machines, with 1 on errors of the system that may pass."""
    # The start-up table says once what is missing; megatron-core warns at every import of it, in every rank. Commands
    # import it only when they run, so that this comes first.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    sys.excepthook = show_defect
    # what the other commands import takes as long as starting Python
    asked = [name for name in sys.argv[1:2] if name in _COMMANDS]
    _run(_made_app(asked or list(_COMMANDS)))


def run_tool(function: Callable[..., None], tool: str) -> None:
    """Entry point of tools/TOOL.py; it ends as `main` does."""
    sys.excepthook = show_defect
    _run(tool_app(function, tool))


def run_convert_tool() -> None:
    """Entry point of tools/convert_checkpoint.py: `illada convert`, also with the options of Megatron's converter."""
    app = _made_app(["convert"])

    def convert() -> None:
        app(["convert", *converter_words(sys.argv[1:])])

    _run(convert)


def _run(app: Callable[[], None]) -> None:
    try:
        app()
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        rank = os.environ.get("RANK")
        # Sums over all ranks have found that a loss is bad, so that all say the same. Of nothing else is that known: a
        # file, a disk or a configuration may be another on one machine, and that one's word is what explains the run's
        # end.
        if rank in (None, "0") or not isinstance(error, FloatingPointError):
            where = f" (rank {rank} on {socket.gethostname()})" if rank is not None else ""
            with suppress(OSError):  # a full disk or a closed terminal changes no exit code
                say(f"illada: error{where}: {error}", error=True)
        if isinstance(error, FloatingPointError):
            sys.exit(3)
        sys.exit(1 if isinstance(error, OSError) and not isinstance(error, _LASTING) else 2)

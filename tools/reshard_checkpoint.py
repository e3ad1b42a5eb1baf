"""`illada checkpoint reshard` by itself: a checkpoint rewritten for another layout, from and to Megatron's too."""

import typer

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.cli.checkpoint_commands import reshard
from illada_megatron.config import ConfigError
from illada_megatron.system.terminal import fail

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.command()(reshard)

if __name__ == "__main__":
    try:
        app()
    except (CheckpointError, ConfigError, OSError) as error:
        fail(error)

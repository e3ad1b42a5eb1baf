"""`illada preprocess` under Megatron's name for it: the same command and options (--input, --output-prefix,
--tokenizer-model, --json-keys, --append-eod, --workers, ...)."""

import typer

from illada_megatron.cli.preprocess_command import preprocess
from illada_megatron.data.errors import DataError
from illada_megatron.system.terminal import fail

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.command()(preprocess)

if __name__ == "__main__":
    try:
        app()
    except (DataError, OSError) as error:
        fail(error)

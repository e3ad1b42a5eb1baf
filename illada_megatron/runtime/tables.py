"""How this program shows names and values in a terminal."""

from contextlib import suppress

from rich.table import Table

from illada_megatron.system.terminal import say


def two_columns(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def tell(text: str) -> None:
    """A line on stderr, by those whose work goes on where nobody can read it: a full disk, a closed terminal."""
    with suppress(OSError):
        say(text, error=True)

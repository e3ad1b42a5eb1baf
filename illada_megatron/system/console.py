"""rich's console under the rule of `terminal`, no control characters. Importing rich takes a fiftieth of a second."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from illada_megatron.system.terminal import printable


def made_console(**options: Any) -> Console:
    """rich's console with `options`: what is printed is text and no markup of rich's, and printable."""
    made = Console(highlight=False, markup=False, emoji=False, **options)
    made.push_render_hook(Printable())
    return made


class Printable(RenderHook):
    """For `Console.push_render_hook`: what is rendered is printable."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_PrintableRenderable(one) for one in renderables]


class _PrintableRenderable:
    """Another's segments. Where a control character was, a table's cell is wider than its column."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments: Iterable[Segment] = console.render(self._inner, options)
        for segment in segments:
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

"""A denoised text in the terminal: each token coloured by the step that revealed it, and a film of how it appeared.

Everything returned is a rich renderable; `Console(record=True)` prints it and `save_svg` keeps it.
"""

import re
from collections.abc import Callable

from rich.console import Group
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text as Words

from illada_megatron.generation.generator import Result
from illada_megatron.generation.settings import Settings
from illada_megatron.generation.text import GIVEN, Text

Piece = Callable[[int], str]  # token id -> the text it stands for

# first step -> last step, legible on dark and light grounds
_SCALE = ((76, 110, 245), (18, 184, 134), (245, 159, 0), (240, 62, 62))
_GIVEN_STYLE = Style(dim=True)
_MASK_STYLE = Style(color="grey50")
_MASK_CHARACTER = "░"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def render(result: Result | Text, piece: Piece, moments: int = 5) -> Group:
    """The coloured text with its legend, then the film.

    Args:
        result: from `Generator.generate`.
        piece: text of a token id (from the tokenizer); spaces and newlines are shown as they are.
        moments: frames of the film, the first before any step, the last after all; at least 2.
    """
    return Group(
        Panel(coloured_text(result, piece), title="text", subtitle=legend(result.steps)),
        film(result, piece, moments),
    )


def coloured_text(result: Result | Text, piece: Piece) -> Words:
    """The finished text, given tokens dim, each generated token in the colour of its step."""
    return _frame(result, piece, result.steps - 1)


def frame(text: Text, piece: Piece, steps: int) -> Panel:
    """A text in work, as it stands. steps: that it may take, for the colours."""
    return Panel(_frame(text, piece, text.step - 1, steps), title=f"step {text.step} of at most {steps}")


def most_steps(settings: Settings) -> int:
    """Steps that a continued text may take."""
    block = settings.block_length or settings.gen_length
    lengths = [block] * (settings.gen_length // block) + [settings.gen_length % block]
    return sum(min(settings.steps if settings.reveal == "steps" else length, length) for length in lengths)


def legend(steps: int, width: int = 24) -> Words:
    """The colour scale from the first to the last step."""
    text = Words("step 1 ")
    for cell in range(width):
        text.append("█", _step_style(cell, width))
    return text.append(f" {steps}")


def film(result: Result | Text, piece: Piece, moments: int = 5) -> Table:
    """The text at evenly spaced moments. Masks are as wide as what they hide, so that words do not move; blocks that
    were not appended yet do not show.

    Raises:
        ValueError: moments is below 2.
    """
    if moments < 2:
        raise ValueError(f"a film needs at least 2 moments (before and after), found {moments}")
    table = Table(show_header=False, show_lines=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1)
    done = sorted({round(moment * result.steps / (moments - 1)) for moment in range(moments)})
    for steps in done:
        table.add_row(f"{steps}/{result.steps}", _frame(result, piece, steps - 1))
    return table


def _frame(result: Result | Text, piece: Piece, step: int, steps: int | None = None) -> Words:
    """The text as it stood after `step` (GIVEN: before the first). steps: for the colours; None: the text's."""
    text, steps = Words(), steps or result.steps
    mask = result.mask_token_id if isinstance(result, Text) else None
    rows = zip(result.tokens.tolist(), result.order.tolist(), result.appended.tolist(), strict=True)
    for token, revealed, appended in rows:
        shown = _CONTROL.sub("·", piece(token))
        if token == mask:
            text.append(_MASK_CHARACTER, _MASK_STYLE)
        elif revealed == GIVEN:
            text.append(shown, _GIVEN_STYLE)
        elif revealed <= step:
            text.append(shown, _step_style(revealed, steps))
        elif appended <= max(step, 0):
            text.append(re.sub(r"[^\n]", _MASK_CHARACTER, shown) or _MASK_CHARACTER, _MASK_STYLE)
    return text


def _step_style(step: int, steps: int) -> Style:
    """Colour of a step, interpolated along the scale."""
    place = step / max(1, steps - 1) * (len(_SCALE) - 1)
    left = min(int(place), len(_SCALE) - 2)
    mix = place - left
    red, green, blue = (round(a + (b - a) * mix) for a, b in zip(_SCALE[left], _SCALE[left + 1], strict=True))
    return Style(color=f"#{red:02x}{green:02x}{blue:02x}")

"""The picture of a denoised text: its colours, its film, its SVG."""

import io

import pytest
import torch
from markov import MASK, cycle, denoised
from rich.console import Console

from illada_megatron.generation import Result, Settings, Text, render
from illada_megatron.generation.render import coloured_text, film, legend

WORDS = ["<mask>", "one ", "two ", "three ", "four ", "five\n"]


def piece(token: int) -> str:
    return WORDS[token]


def printed(renderable) -> str:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(renderable)
    return console.export_text()


@pytest.fixture(scope="module")
def result() -> Text:
    return denoised(cycle(), [1, 2], Settings(steps=4, block_length=4, gen_length=8))


def test_text_is_coloured_by_step(result):
    text = coloured_text(result, piece)
    assert text.plain == "".join(WORDS[token] for token in result.tokens.tolist())
    styles = [span.style for span in text.spans]
    assert all(style.dim for style in styles[:2])
    colours = [style.color.name for style in styles[2:]]
    assert len(set(colours)) == 8, "eight steps, eight colours"
    ends = [legend(result.steps).spans[i].style.color.name for i in (0, -1)]
    assert [colours[i] for i in (result.order[2:].argmin(), result.order[2:].argmax())] == ends


def test_film_goes_from_masks_to_text(result):
    table = film(result, piece)
    labels, frames = (list(column.cells) for column in table.columns)
    assert labels == ["0/8", "2/8", "4/8", "6/8", "8/8"]
    plain = [frame.plain for frame in frames]
    assert plain[0] == "one two ░░░░░░░░░░░░░░░\n░░░░"
    assert plain[2] == "one two three four five\none "
    assert plain[-1] == coloured_text(result, piece).plain


def test_film_shows_blocks_when_they_are_appended(result):
    frames = [frame.plain for frame in list(film(result, piece).columns[1].cells)]
    full = coloured_text(result, piece).plain
    first_block = "".join(WORDS[token] for token in result.tokens[:6].tolist())
    for done, frame in zip((0, 2, 4, 6, 8), frames, strict=True):
        assert len(frame) == len(first_block if done <= 4 else full)
        masked = sum(len(WORDS[t].rstrip("\n")) for t, o, a in rows(result) if done <= o and a <= max(done - 1, 0))
        assert frame.count("░") == masked


def rows(result):
    return zip(result.tokens.tolist(), result.order.tolist(), result.appended.tolist(), strict=True)


def test_film_of_an_infilling_shows_all_masks_from_the_start():
    filled = denoised(cycle(), [1, MASK, MASK, 4], Settings(steps=1, block_length=1), infill=True)
    frames = [frame.plain for frame in film(filled, piece, moments=3).columns[1].cells]
    assert frames == ["one ░░░░░░░░░░four ", "one two ░░░░░░four ", "one two three four "]


def test_svg(result, tmp_path):
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(render(result, piece))
    path = tmp_path / "denoising.svg"
    console.save_svg(str(path), title="iLLaDA")
    svg = path.read_text()
    last_colour = legend(result.steps).spans[-1].style.color.name
    assert "three" in svg
    assert "░" in svg
    assert last_colour in svg


def test_nothing_generated_and_one_step():
    given = denoised(cycle(), [1, 2], Settings(), infill=True)
    assert "one two" in printed(render(given, piece))
    once = denoised(cycle(), [1, MASK], Settings(steps=1), infill=True)
    assert "1/1" in printed(render(once, piece))


def test_markup_and_terminal_codes_in_tokens_are_only_text():
    """A model may write anything; it must not recolour the terminal or break rich's markup."""
    tokens = torch.tensor([0, 1])
    hostile = Result(tokens, tokens * 0, tokens * 0, tokens * 0.0, "", "length", 0, 0, 1)
    output = printed(render(hostile, lambda token: ["[bold]x[/]", "\x1b[31mred"][token]))
    assert "[bold]x[/]·[31mred" in output


def test_a_film_needs_two_moments(result):
    with pytest.raises(ValueError, match="at least 2 moments"):
        film(result, piece, moments=1)

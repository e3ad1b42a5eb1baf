"""`illada generate --html`: the page, in a real browser, from a file and without a network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import chromium

from illada_megatron.generation import Result
from illada_megatron.generation.page import write_page

# hostile as a model may be: ends of scripts, comments, entities, other directions of text
PIECES = ["def", "</script><b>", "<!--", "\n", "\u2028", " &amp;", "\u202e漢", "    " * 40]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    tokens = torch.arange(len(PIECES))
    order, appended = torch.tensor([-1, 2, 0, 1, 0, 3, 2, 3]), torch.tensor([-1, 0, 0, 0, 0, 2, 2, 2])
    first = Result(tokens, order, appended, tokens / 10, "", "length", 0, 1, 4)
    second = Result(tokens[:2], order[:2], appended[:2], tokens[:2] / 10, "", "length", 0, 1, 3)
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_page(file, [first, second], PIECES.__getitem__)
    with chromium() as browser:
        browser.get(Path(file).as_uri())
        yield browser


def slide(page: Any, step: int) -> list[str]:
    """The classes of what is shown then."""
    page.execute_script(
        "const s = document.getElementById('step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", step
    )
    shown = page.find_elements("css selector", "#text span:not([hidden])")
    return [one.get_attribute("class") for one in shown]


def test_every_token_is_there_as_text(page: Any) -> None:
    assert page.execute_script("return document.getElementById('text').textContent") == "".join(PIECES)
    assert not page.find_elements("css selector", "#text b")
    assert not page.get_log("browser")


def test_the_slider_goes_through_the_steps(page: Any) -> None:
    assert slide(page, 0) == ["given", "mask", "mask", "mask break", "mask"]
    assert slide(page, 1) == ["given", "mask", "token now", "mask break", "token now"]
    assert slide(page, 3)[1:] == ["token now", "token", "token break", "token", "mask", "token now", "mask"]
    assert "mask" not in slide(page, 4)


def test_nothing_is_wider_than_the_page(page: Any) -> None:
    slide(page, 4)
    right = "[...document.querySelectorAll('#text span')].flatMap((s) => [...s.getClientRects()].map((r) => r.right))"
    assert page.execute_script(f"return Math.max(...{right}) <= window.innerWidth")


def test_it_plays_to_its_end(page: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    page.find_element("id", "play").click()
    WebDriverWait(page, 60).until(lambda one: one.find_element("id", "count").text == "step 4 of 4")
    WebDriverWait(page, 60).until(lambda one: one.find_element("id", "play").text == "Play")


def test_colours_and_texts_are_chosen(page: Any) -> None:
    from selenium.webdriver.support.ui import Select

    slide(page, 4)
    Select(page.find_element("id", "colour")).select_by_value("confidence")
    assert page.find_element("id", "low").text == "confidence 0"
    colours = [one.value_of_css_property("background-color") for one in page.find_elements("class name", "token")]
    assert len(set(colours)) == len(colours)
    Select(page.find_element("id", "which")).select_by_value("1")
    assert page.execute_script("return document.getElementById('text').textContent") == "".join(PIECES[:2])
    assert page.find_element("id", "count").text == "step 3 of 3"

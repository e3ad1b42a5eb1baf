"""The page at /, in a real browser."""

from collections.abc import Iterator
from typing import Any

import pytest
from browser import chromium
from served import Served, Serving

from illada_megatron.generation import Generator, Settings


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def field(browser: Any, name: str, value: object) -> None:
    browser.execute_script(
        "const one = document.getElementById(arguments[0]); one.value = arguments[1];"
        "one.dispatchEvent(new Event('change'));",
        name,
        str(value),
    )


def run(browser: Any, **fields: object) -> str:
    """Press Run, and wait. Returns the line of the state."""
    from selenium.webdriver.support.ui import WebDriverWait

    for name, value in fields.items():
        field(browser, name, value)
    browser.find_element("id", "run").click()
    WebDriverWait(browser, 60).until(lambda one: one.find_element("id", "run").is_enabled())
    return browser.find_element("id", "state").text


def text(browser: Any) -> str:
    return browser.execute_script("return document.getElementById('text').textContent")


def test_a_text_comes(browser: Any, served: Served, generator: Generator) -> None:
    browser.get(served.url)
    state = run(browser, prompt="def <b>main</b>(", gen_length=20, block_length=8, steps=4, seed=3)
    (offline,) = generator.generate(["def <b>main</b>("], Settings(gen_length=20, block_length=8, steps=4))
    piece = generator.tokenizer.piece
    assert text(browser) == "def <b>main</b>(" + "".join(map(piece, offline.tokens[offline.prompt_tokens :].tolist()))
    assert (
        state
        == f"{offline.steps} steps, {offline.computed / offline.steps:.0f} positions a step; ended by length; seed 3"
    )
    # back to where nothing was there
    browser.execute_script(
        "const s = document.getElementById('step'); s.value = 1; s.dispatchEvent(new Event('input'))"
    )
    classes = [one.get_attribute("class") for one in browser.find_elements("css selector", "#text span:not([hidden])")]
    assert classes[0] == "given"
    assert sorted(classes[1:]) == ["mask"] * 6 + ["token now"] * 2
    assert not browser.find_elements("css selector", "#text b"), "text is never HTML"
    assert not browser.get_log("browser"), "no error, and nothing that the policy refuses"


def test_gaps_are_filled(browser: Any, served: Served, generator: Generator) -> None:
    browser.get(served.url)
    prompt = "for <mask:4> in <mask:2>:"
    state = run(browser, prompt=prompt, gen_length=20, steps=1, block_length=8)
    (offline,) = generator.generate([prompt], Settings(steps=1, block_length=8))
    assert text(browser) == "".join(map(generator.tokenizer.piece, offline.tokens.tolist()))
    assert state.startswith("1 steps")


def test_errors_are_shown(browser: Any, serving: Serving) -> None:
    with serving(keys=("secret",)) as server:
        browser.get(server.url)
        assert "an API key of this server is needed" in run(browser, gen_length=8, block_length=8, steps=8)
        assert "ended by length" in run(browser, key="secret")
        assert "model.max_sequence_length" in run(browser, gen_length=4096)
    assert "Failed to fetch" in run(browser)


def test_stopped(browser: Any, served: Served) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(served.url)
    for name, value in (("gen_length", 480), ("block_length", 480), ("steps", 480)):
        field(browser, name, value)
    browser.find_element("id", "run").click()
    WebDriverWait(browser, 60).until(lambda one: one.find_element("id", "state").text.startswith("step "))
    browser.find_element("id", "stop").click()
    WebDriverWait(browser, 60).until(lambda one: one.find_element("id", "state").text == "stopped")
    with served.http() as http:
        while http.get("/health").json()["running"]:
            pass

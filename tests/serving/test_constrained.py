"""Texts that follow a regular expression or a JSON schema: a request's own or the operator's default, whole and
streamed, by tokenizers of two kinds."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
import torch
from served import Served, Serving
from test_settled import sentence_piece

pytest.importorskip("outlines_core")

from illada_megatron.data.tokenizers.tokenizer import load_tokenizer
from illada_megatron.generation import FunctionModel, Generator, Settings, indexing
from tests.checkpoint.random_weights import small_config

BASE: dict[str, Any] = {"gen_length": 32, "block_length": 8, "steps": 8}
FREE: dict[str, Any] = {"temperature": 1.5, "seed": 4}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["ß", "x"]}}, "required": ["a", "b"]}
EXPRESSIONS: list[dict[str, Any]] = [
    {"regex": "( the|of)+ ß?"},
    {"regex": " [a-z ]{3,12}", "eos": "last"},
    {"regex": "(漢字|🙂|ß){1,4}"},
    {"json_schema": json.dumps(SCHEMA), "block_length": None},
]
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """Of a tokenizer that puts a space before a text."""
    words = load_tokenizer(sentence_piece(tmp_path_factory.mktemp("pieces")))
    mask = words.vocab_size
    likes = torch.randn(mask + 1, mask + 1, generator=torch.Generator().manual_seed(0))
    sizes = (f"model.vocab_size={mask + 1}", f"model.mask_token_id={mask}", "model.max_sequence_length=256")
    return Generator(FunctionModel(lambda tokens: likes[tokens], mask + 1), words, small_config(*sizes).model)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def either(request: pytest.FixtureRequest, generator: Generator, pieces: Generator) -> Generator:
    return generator if request.param == "byte-level" else pieces


@pytest.fixture(scope="module")
def server(either: Generator, serving: Serving) -> Iterator[Served]:
    with serving(either) as started:
        yield started


def texts(server: Served, prompt: str, asked: dict[str, Any]) -> list[str]:
    """Whole, and streamed."""
    client = server.client()
    whole = client.completions.create(model="tiny", prompt=prompt, extra_body=asked).choices[0].text
    stream = client.completions.create(model="tiny", prompt=prompt, stream=True, extra_body=asked)
    parts = [chunk.choices[0].text for chunk in stream]
    assert len(parts) > 2
    return [whole, "".join(parts)]


@pytest.mark.parametrize("asked", EXPRESSIONS, ids=lambda one: next(iter(one.values())))
def test_a_request_s_own(asked: dict[str, Any], server: Served, either: Generator) -> None:
    (result,) = either.generate(["the of"], Settings(**{**BASE, **FREE, **asked}))
    assert "regex" not in asked or re.fullmatch(asked["regex"], result.text)
    assert texts(server, "the of", {**FREE, **asked}) == [result.text] * 2


def test_the_operator_s(either: Generator, serving: Serving) -> None:
    own = {"regex": " (the |of )+"}
    (result,) = either.generate(["the"], Settings(**{**BASE, **FREE, **own}))
    (filled,) = either.generate(["the <mask:3> of"], Settings(**BASE))
    with serving(either, defaults={**BASE, **own}) as server, server.http() as http:
        assert texts(server, "the", FREE) == [result.text] * 2
        for stop in ({"stop": "a"}, {"stop_pattern": "a"}):
            answer = http.post("/v1/completions", json={"prompt": "a", **stop})
            assert (answer.status_code, "would cut a text" in answer.text) == (400, True)
        answer = http.post("/v1/infill", json={"prompt": "the <mask:3> of"})
        assert answer.json()["choices"][0]["text"] == filled.text
        asked = {"prompt": "a", "json_schema": {"type": "boolean"}}
        assert http.post("/v1/completions", json=asked).json()["choices"][0]["text"] in ("true", "false")
        if either.tokenizer_path is not None:
            answer = http.post("/v1/chat/completions", json={"messages": [USER]}).json()
            assert re.fullmatch(own["regex"], answer["choices"][0]["message"]["content"])


class Answer(pydantic.BaseModel):
    a: bool
    b: Literal["x", "y"]


def test_openai_s_response_format(served: Served) -> None:
    client, messages = served.client(), [USER]
    chat = client.chat.completions
    found = chat.parse(model="tiny", messages=messages, response_format=Answer, temperature=1, seed=3, max_tokens=80)
    assert isinstance(found.choices[0].message.parsed, Answer)
    schema = {"name": "a", "strict": True, "schema": {"enum": ["yes", "no"]}}
    form = {"type": "json_schema", "json_schema": schema}
    stream = chat.create(model="tiny", messages=messages, response_format=form, stream=True)
    assert "".join(chunk.choices[0].delta.content for chunk in stream) in ('"yes"', '"no"')
    chat.create(model="tiny", messages=messages, response_format={"type": "text"}, max_tokens=2)
    for wrong, why in (
        ({"type": "json_object"}, "nests without end"),
        ({"type": "json_schema"}, "goes with type"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"minimum": 3}}}, "it has minimum"),
    ):
        with pytest.raises(openai.BadRequestError, match=why):
            chat.create(model="tiny", messages=messages, response_format=wrong)
    with pytest.raises(openai.BadRequestError, match="would cut a text"):
        chat.create(model="tiny", messages=messages, response_format=form, stop="a")


@pytest.mark.parametrize(
    ("path", "asked", "why"),
    [
        ("completions", {"regex": "(a"}, "regex '(a': "),
        ("completions", {"regex": "a{90}"}, "the shortest text that matches has"),
        ("completions", {"regex": "a", "json_schema": {}}, "are both given"),
        ("completions", {"regex": "a", "eos": "never"}, "no way to end"),
        ("completions", {"regex": "a" * 10_001}, "at most 10000"),
        ("completions", {"regex": "(a|b)*a(a|b){13}"}, "states with"),
        ("completions", {"json_schema": "[]"}, "expected an object"),
        ("infill", {"regex": "a"}, "no such field"),
    ],
)
def test_refused(path: str, asked: dict[str, Any], why: str, served: Served) -> None:
    with served.http() as http:
        answer = http.post(f"/v1/{path}", json={"prompt": "a<mask:3>" if path == "infill" else "a", **asked})
    assert answer.status_code == 400
    assert why in answer.json()["error"]["message"]


def test_an_automaton_that_would_never_be_made(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile the others are answered."""
    monkeypatch.setattr(indexing, "_SECONDS", 2)
    doubling = {"a0": {"type": "boolean"}} | {
        f"a{n}": {"type": "object", "properties": {one: {"$ref": f"#/$defs/a{n - 1}"} for one in "xyz"}}
        for n in range(1, 30)
    }
    bodies = ({"regex": "(a|b)*a(a|b){40}"}, {"json_schema": {"$defs": doubling, "$ref": "#/$defs/a29"}})
    with served.http() as http:
        for body in bodies:
            answer = http.post("/v1/completions", json={"prompt": "a", **body})
            assert (answer.status_code, "takes more than 2 seconds" in answer.text) == (400, True)


def test_memory_of_an_automaton_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {bytes([byte]): [byte] for byte in range(1, 256)}
    assert indexing.edges_apart("[a-c]*", words).states == indexing.edges_of("[a-c]*", words).states
    monkeypatch.setattr(indexing, "_BYTES", 1 << 26)
    with pytest.raises(ValueError, match="GiB to make"):
        indexing.edges_apart("(a|b)*a(a|b){15}", words)

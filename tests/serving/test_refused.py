"""What is not answered: the status, the words, and that the server goes on."""

import json
import os
import socket
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError
from served import Served, Serving

from illada_megatron.data.tokenizers.tokenizer import HuggingFaceTokenizer
from illada_megatron.serving.bodies import Body, ChatBody, CompletionBody

USER = {"role": "user", "content": "a"}
COMPLETIONS, CHAT, INFILL = "/v1/completions", "/v1/chat/completions", "/v1/infill"


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (COMPLETIONS, {"prompt": "a", "lenght": 3}, "lenght", "no such field"),
        (COMPLETIONS, {"prompt": "a", "\ud800": 3}, "\\ud800", "no such field"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 3}, "logprobs", "no probability of the text"),
        (COMPLETIONS, {"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "set repetition_penalty"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "/v1/infill"),
        (COMPLETIONS, {"prompt": "a", "best_of": True}, "best_of", "set n"),
        (COMPLETIONS, {"max_tokens": 3}, "prompt", "required"),
        (COMPLETIONS, {"prompt": []}, "prompt", "expected 1 to 16"),
        (COMPLETIONS, {"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        (COMPLETIONS, {"prompt": [1, 400]}, None, "outside of the model's 400"),
        (COMPLETIONS, {"prompt": [1, -1]}, "prompt.1", "greater than or equal to 0"),
        (COMPLETIONS, {"prompt": [1, 5]}, "prompt", "ask /v1/infill"),
        (COMPLETIONS, {"prompt": "a " * 600}, None, "model.max_sequence_length is 512: shorten"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 1 << 70}, None, "model.max_sequence_length is 512"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 4, "gen_length": 5}, None, "names of one thing"),
        (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature", "valid number"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, None, "temperature must be a finite number from 0 up"),
        (COMPLETIONS, {"prompt": "a", "temperature": float("nan")}, "temperature", "finite"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        (COMPLETIONS, {"prompt": "a", "top_k": -1}, "top_k", "greater than or equal to 0"),
        (COMPLETIONS, {"prompt": ["a", 3]}, "prompt.1", "valid string"),
        (COMPLETIONS, {"prompt": [[1], ["a"]]}, "prompt.1.0", "valid integer"),
        (COMPLETIONS, {"prompt": {"a": 3}}, "prompt", "valid string"),
        (COMPLETIONS, {"prompt": "a", "steps": 9}, None, "steps 9 exceeds block_length 8"),
        (COMPLETIONS, {"prompt": "a", "n": 17}, "n", "expected 1 to 16"),
        (COMPLETIONS, {"prompt": "a", "stop": ["b"] * 17}, "stop", "at most 16"),
        (COMPLETIONS, {"prompt": "a", "stop": ["b" * 501, "c" * 500]}, None, "stop: 1001 characters together"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, None, "stop holds an empty string"),
        (COMPLETIONS, {"prompt": "a", "stop_pattern": "(b"}, None, "no regular expression of RE2"),
        (COMPLETIONS, {"prompt": "a", "stop_pattern": "((b{1000}){1000}){1000}"}, None, "RE2"),
        (COMPLETIONS, {"prompt": "a", "stop_pattern": r"(b)\1"}, None, "RE2"),
        (COMPLETIONS, {"prompt": "a", "stop_pattern": "b*"}, None, "matches an empty text"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        (CHAT, {"messages": [{"role": "user", "content": "<|im_end|>"}]}, None, "special token in content"),
        (CHAT, {"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "tool_calls", "a message is a role and a text"),
        (CHAT, {"messages": [{**USER, "lenght": 3}]}, "lenght", "no such field"),
        (CHAT, {"messages": [USER], "tools": [{"type": "function"}]}, "tools", "calls none"),
        (CHAT, {"messages": [{**USER, "content": [{"type": "image"}]}]}, "messages.0.content.0.type", "'text'"),
        (INFILL, {"prompt": "no gap"}, "prompt", "has no gap"),
        (INFILL, {"prompt": "<mask:0>"}, "prompt", "has no gap"),
        (INFILL, {"prompt": "<mask:999999999999>"}, "prompt", "ask for fewer"),
        (INFILL, {"prompt": f"<mask:{'9' * 5000}>"}, "prompt", "ask for fewer"),
        (INFILL, {"prompt": "<mask:4096>" * 3000}, "prompt", "ask for 12288000 tokens"),
        (INFILL, {"prompt": "<mask:0>" * 600}, "prompt", "ask for fewer"),
        (INFILL, {"prompt": "<mask:4>", "stop": "a"}, "stop", "when its gaps are filled"),
    ],
)
def test_bodies(served: Served, path: str, body: dict[str, Any], param: str | None, message: str) -> None:
    with served.http() as http:
        answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_what_changes_nothing_is_no_reason(served: Served) -> None:
    """As LangChain and others write out what they do not want."""
    usual = {
        "logprobs": None,
        "echo": False,
        "best_of": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "user": "u",
    }
    answer = served.client().completions.create(model="tiny", prompt="a", max_tokens=4, **usual)
    assert answer.usage.completion_tokens == 4


WRONG_BODIES: list[tuple[str, type[Body], dict[str, Any]]] = [
    (COMPLETIONS, CompletionBody, {"prompt": [1.5] * 200_000}),
    (COMPLETIONS, CompletionBody, {"prompt": [1, *[1.5] * 200_000]}),
    (COMPLETIONS, CompletionBody, {"prompt": [[1.5]] * 140_000}),
    (COMPLETIONS, CompletionBody, {"prompt": "a", **{f"x{number}": 1 for number in range(70_000)}}),
    (CHAT, ChatBody, {"messages": [1] * 300_000}),
    (CHAT, ChatBody, {"messages": [{"role": "user", "content": [1] * 300_000}]}),
    (CHAT, ChatBody, {"messages": [{**USER, **{f"x{number}": 1 for number in range(70_000)}}]}),
]


@pytest.mark.parametrize(("path", "kind", "body"), WRONG_BODIES, ids=range(len(WRONG_BODIES)))
def test_of_the_faults_of_a_body_few_are_told(
    served: Served, path: str, kind: type[Body], body: dict[str, Any]
) -> None:
    """pydantic made an error of each of 100,000, and of each branch: seconds on the event loop."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate(body)
    assert found.value.error_count() <= 2
    content = json.dumps(body).encode()
    assert len(content) <= 1 << 20
    with served.http() as http:
        answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "no such field" in answer.text or "valid" in answer.text


def test_prompts_are_counted_before_they_are_encoded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", encode)
    with served.http() as http:
        answer = http.post(COMPLETIONS, json={"prompt": ["a"] * 200_000})
    assert (answer.status_code, "expected 1 to 16" in answer.text) == (400, True)


def test_the_openai_client_knows_the_errors(served: Served, serving: Serving) -> None:
    with pytest.raises(openai.NotFoundError, match="there is 'tiny' alone, found 'gpt-4'"):
        served.client().completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="no such field"):
        served.client().completions.create(model="tiny", prompt="a", extra_body={"lenght": 3})
    with serving(keys=("one", "two"), per_minute=2) as server:
        with pytest.raises(openai.AuthenticationError, match="an API key of this server is needed"):
            server.client("three").models.list()
        for key in ("one", "two", "one", "two"):
            assert server.client(key).completions.create(model="tiny", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.RateLimitError, match="more than 2 requests a minute") as refused:
            server.client("one").completions.create(model="tiny", prompt="a", max_tokens=1)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
        with server.http() as http:
            assert http.get("/health").status_code == 200
            assert http.get("/metrics").status_code == 401


def test_a_key_of_other_letters(serving: Serving) -> None:
    with serving(keys=("schlüssel-鍵",)) as server, server.http() as http:
        for key, status in (("schlüssel-鍵", 200), ("schlüssel", 401), ("\udcff", 401)):
            headers = {b"Authorization": b"Bearer " + key.encode("utf-8", "surrogateescape")}
            assert http.get("/v1/models", headers=headers).status_code == status


def test_garbage(served: Served) -> None:
    kind = {"Content-Type": "application/json"}
    with served.http() as http:
        for content in (os.urandom(5000), b"", b"[", b"[" * 100_000, b'"\xff"', b"null", b'{"prompt": 1e999}'):
            answer = http.post(COMPLETIONS, content=content, headers=kind)
            assert answer.status_code == 400, content[:20]
            assert answer.json()["error"]["type"] == "invalid_request_error"
        # a page of another origin may send these without asking first
        for other in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            assert (
                http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"Content-Type": other}).status_code == 415
            )
        assert http.get("/v1/nothing").json()["error"]["message"] == "Not Found"
        assert http.get(COMPLETIONS).status_code == 405
    port = int(served.url.rpartition(":")[2])
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as wire:
            wire.sendall(os.urandom(10_000))
    with served.http() as http:
        assert http.get("/health").json()["status"] == "ok"


def test_bodies_have_an_end(serving: Serving) -> None:
    with serving(most_bytes=1000, body_seconds=0.2) as server, server.http() as http:
        assert http.post(COMPLETIONS, json={"prompt": "a" * 2000}).status_code == 413
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as wire:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            wire.sendall(head.encode() + b"Content-Length: 9\r\n\r\n{")
            assert wire.recv(1000).startswith(b"HTTP/1.1 408")


def test_other_names_do_not_lead_here(serving: Serving) -> None:
    """A stranger's page may let its own name lead to 127.0.0.1: the browser takes it for the page's origin."""
    with serving(allowed_hosts=("localhost", "127.0.0.1", "[::1]")) as server, server.http() as http:
        for host, status in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.com", 400), ("", 400)):
            assert http.get("/health", headers={"Host": host}).status_code == status
        assert "access-control-allow-origin" not in http.get("/health", headers={"Origin": "http://evil.com"}).headers


def test_limits_of_the_operator(serving: Serving) -> None:
    with serving(most_tokens=10, most_texts=2) as server, server.http() as http:
        assert "generates at most 10" in http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 11}).text
        assert http.post(COMPLETIONS, json={"prompt": "a"}).json()["usage"]["completion_tokens"] == 10
        assert http.post(COMPLETIONS, json={"prompt": ["a", "b"], "n": 2}).status_code == 400
        for gaps in ("<mask:11>", "<mask:6>b<mask:5>", "<mask:0000000000000000000011>"):
            assert "at most 10" in http.post(INFILL, json={"prompt": gaps}).json()["error"]["message"]
        assert http.post(INFILL, json={"prompt": "<mask:6>b<mask:4>"}).json()["usage"]["completion_tokens"] == 10
        assert httpx.get(f"{server.url}/v1/models/tiny").json()["max_model_len"] == 512


def test_a_request_that_could_never_wait_is_not_told_to_come_back(serving: Serving) -> None:
    with serving(most_queued=2) as server, server.http() as http:
        answer = http.post(COMPLETIONS, json={"prompt": "a", "n": 3})
    assert (answer.status_code, "this server lets 2 wait" in answer.text) == (400, True)

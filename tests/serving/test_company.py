"""Many at once, those who leave, those who do not read, and steps that fail."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
import torch
from served import Served, Serving
from torch import Tensor

from illada_megatron.generation import Generator, Predict, Text

COMPLETIONS = "/v1/completions"
SMALL = {"gen_length": 4, "block_length": 4, "steps": 1}
LONG = {"prompt": "a", "n": 16, "gen_length": 64, "block_length": 64, "steps": 64, "stream": True}
"""Some 600 kB of events."""
Computed = Callable[[Predict], Generator]


def likes(token: int) -> Predict:
    """A model that is sure of one token everywhere."""

    def predict(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 400)
        logits[..., token] = 9.0
        return logits

    return predict


class Gated:
    """A model whose every pass waits until it is let through."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.passes = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.passes += 1
        self.gate.acquire()
        return likes(80)(tokens)

    def let(self, passes: int) -> None:
        """Returns when the next one waits."""
        aim = self.passes + passes
        self.gate.release(passes)
        until(lambda: self.passes >= aim)


def until(condition: Callable[[], Any]) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < 60, "hangs"
        time.sleep(0.005)


def state(served: Served) -> dict[str, Any]:
    return httpx.get(f"{served.url}/health").json()


@contextmanager
def wire(served: Served, body: dict[str, Any], read_bytes: int | None = None) -> Iterator[socket.socket]:
    """A request on a connection of its own, of which nothing has been read. read_bytes: that the system may hold."""
    with socket.socket() as made:
        if read_bytes is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_bytes)
        made.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        made.sendall(request(body))
        yield made


def request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def read(wire: socket.socket) -> bytes:
    return b"".join(iter(lambda: wire.recv(1 << 16), b""))


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_worked_for_no_more(stream: bool, serving: Serving, computed: Computed) -> None:
    model = Gated()
    with serving(computed(model), most_running=1) as server:
        long = {"prompt": "a", "gen_length": 400, "stream": stream}
        with wire(server, long), wire(server, long):
            model.let(3)  # of the first, for a text of one runs alone
            assert (state(server)["running"], state(server)["queued"]) == (1, 1)
        until(lambda: server.http().get("/metrics").text.count('illada_texts_total{finish="cancelled"} 2.0'))
        model.gate.release()  # the step in hand
        until(lambda: state(server)["running"] == 0)
        assert model.passes == 4
        assert state(server)["queued"] == 0
        with wire(server, {"prompt": "a", **SMALL}) as next_one:
            model.gate.release()
            assert b'"finish_reason":"length"' in read(next_one)
        assert model.passes == 5


def test_a_queue_of_a_thousand(serving: Serving, computed: Computed) -> None:
    """Nobody who was accepted is lost, everybody else is told to come back."""
    model = Gated()

    async def ask(server: Served) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        writer.write(request({"prompt": "a", **SMALL}))
        answer = await reader.read()
        writer.close()
        return answer

    async def all_of_them(server: Served) -> list[bytes]:
        asked = [asyncio.create_task(ask(server)) for _ in range(1100)]
        await asyncio.to_thread(until, lambda: sum(one.done() for one in asked) >= 100)
        model.gate.release(10_000)
        return await asyncio.gather(*asked)

    with serving(computed(model), most_running=1, most_queued=1000) as server:
        with wire(server, {"prompt": "a", **SMALL}):
            until(lambda: model.passes == 1)
            answers = asyncio.run(all_of_them(server))
        until(lambda: state(server)["running"] == 0)
    good = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200")]
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 429")]
    assert (len(good), len(refused)) == (1000, 100)
    assert all(b'"text":"kkkk"' in answer for answer in good)
    assert all(b"retry-after: 1001" in answer and b'"code":"queue_full"' in answer for answer in refused)


def test_a_failing_step_is_of_its_own_text(
    serving: Serving, computed: Computed, generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    (poison,) = generator.tokenizer.encode("!")

    def predict(tokens: Tensor) -> Tensor:
        logits = likes(80)(tokens)
        return logits * torch.nan if tokens[0, 0] == poison else logits

    async def ask(client: httpx.AsyncClient, prompt: str) -> httpx.Response:
        return await client.post(COMPLETIONS, json={"prompt": prompt, "gen_length": 32})

    async def mixed(server: Served) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            return await asyncio.gather(*[ask(client, one) for one in ("a", "!", "a", "!")])

    with serving(computed(predict)) as server:
        answers = asyncio.run(mixed(server))
        assert [answer.status_code for answer in answers] == [200, 500, 200, 500]
        message = answers[1].json()["error"]["message"]
        assert "NaN" not in message
        (record,) = [one for one in caplog.records if message.rpartition(" ")[2] in one.getMessage()]
        assert "NaN" in str(record.exc_info)
        assert {answer.json()["choices"][0]["text"] for answer in answers[::2]} == {"k" * 32}
        with wire(server, {"prompt": "!", "stream": True}) as stream:
            assert b'data: {"error":{"message":"the step failed: whoever runs this server finds why' in read(stream)
        for _ in range(3):
            assert asyncio.run(mixed(server))[0].status_code == 200
        assert state(server)["failed_steps_in_a_row"] < 3, "others' texts have worked meanwhile"


def test_health_says_that_nothing_works(serving: Serving, computed: Computed) -> None:
    broken = True

    def predict(tokens: Tensor) -> Tensor:
        if broken:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return likes(80)(tokens)

    with serving(computed(predict)) as server, server.http() as http:
        for _ in range(3):
            assert http.get("/health").status_code == 200
            answer = http.post(COMPLETIONS, json={"prompt": "a"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "memory")
        assert (http.get("/health").status_code, state(server)["status"]) == (503, "failing")
        broken = False
        assert http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("fault", ["the request's", "the machine's"])
def test_health_comes_back_without_a_request(fault: str, serving: Serving, computed: Computed) -> None:
    """A balancer sends nothing to who says 503."""
    broken = True

    def predict(tokens: Tensor) -> Tensor:
        logits = likes(80)(tokens)
        fails = tokens.shape[1] > 8 if fault == "the request's" else broken
        return logits * torch.nan if fails else logits

    with serving(computed(predict)) as server, server.http() as http:
        for _ in range(3):
            assert http.post(COMPLETIONS, json={"prompt": "a" * 20, "max_tokens": 8}).status_code == 500
        assert http.get("/health").status_code == 503
        if fault == "the machine's":
            time.sleep(2.5)  # longer than a probe waits
            assert http.get("/health").status_code == 503
        broken = False
        until(lambda: http.get("/health").status_code == 200)
        assert state(server)["failed_steps_in_a_row"] == 0


def test_who_reads_slowly_keeps_nobody_waiting(serving: Serving, computed: Computed) -> None:
    with serving(computed(likes(80)), send_bytes=4096) as server, wire(server, LONG, read_bytes=4096) as slow:
        until(lambda: state(server)["running"])
        others = [server.client().completions.create(model="tiny", prompt="a", max_tokens=8) for _ in range(3)]
        assert {one.choices[0].text for one in others} == {"k" * 8}
        until(lambda: state(server)["running"] == 0)  # its texts are done, though nobody has read them
        events = [json.loads(line[6:]) for line in read(slow).splitlines() if line.startswith(b'data: {"id"')]
    texts = [""] * 16
    for choice in (event["choices"][0] for event in events):
        texts[choice["index"]] += choice["text"]
    assert texts == ["k" * 64] * 16
    assert len(events) < 16 * 40, "steps were put together"


def test_who_never_reads_is_disconnected(serving: Serving, computed: Computed) -> None:
    options = {"send_bytes": 4096, "unread_seconds": 0.5}
    with serving(computed(likes(80)), **options) as server, wire(server, LONG, read_bytes=4096):
        until(lambda: f'requests_total{{path="{COMPLETIONS}",status="200"}} 1.0' in server.http().get("/metrics").text)


def test_memory_comes_back(served: Served) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "a " * 50, "gen_length": 16, "cache": "dual", "stream": True},
        {"prompt": "a " * 50, "gen_length": 16, "cache": "prefix", "n": 4},
        {"prompt": "a " * 50, "gen_length": 16, "guidance": 1.0, "cache": "delayed"},
    ]

    def texts() -> set[int]:
        return {id(one) for one in gc.get_objects() if isinstance(one, Text)}

    others = texts()  # tracebacks of tests before this one

    def many(rounds: int) -> int:
        for number in range(rounds):
            with wire(served, bodies[number % 3]) as one:
                if number % 2:
                    read(one)
        until(lambda: state(served)["running"] + state(served)["queued"] == 0)
        gc.collect()
        assert texts() <= others, "a text is held"
        return psutil.Process().memory_info().rss

    many(18)
    before = many(6)
    assert many(24) < before + (20 << 20)

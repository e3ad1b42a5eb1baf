"""`illada serve` under load: throughput of 8 clients against one, then minutes of clients of all kinds.

    python -m benchmarks.generation.serve_load --checkpoint runs/my/checkpoints --minutes 10

One client and eight take turns, so that what else the machine does meets both: each asks for texts of the same length,
one after the other. In the soak some stream, some leave in the middle, some send garbage or ask for what is refused,
some do not read. It holds where every other request was answered whole, nothing is left in work, and the process has
the memory that it had after its first minute. The last line is one line of JSON."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from statistics import median
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console

from benchmarks.measuring.bars import at_least, at_most, show_bars, verdict

CLIENTS = 8
GROWTH_MB = 32.0
RATIO = 4.0


class Server:
    """The command, in a process of its own."""

    def __init__(self, checkpoint: str, tokenizer: str | None, device: str) -> None:
        command = [sys.executable, "-m", "illada_megatron", "serve", "--checkpoint", checkpoint, "--port", "0"]
        command += ["--device", device, *(["--tokenizer", tokenizer] if tokenizer else [])]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().rpartition(" ")[2].strip()
        self._memory = psutil.Process(self.process.pid)

    def memory_mb(self) -> float:
        return self._memory.memory_info().rss / 1e6

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=300).json()
        return found

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


def tokens_per_second(server: Server, clients: int, texts: int, body: dict[str, Any]) -> float:
    """Of `clients`, each of which asks for `texts`, one after the other."""

    def client(number: int) -> int:
        with httpx.Client(timeout=600) as http:
            answers = [http.post(f"{server.url}/v1/completions", json={**body, "seed": number}) for _ in range(texts)]
        return sum(answer.json()["usage"]["completion_tokens"] for answer in answers)

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(client, range(clients)))
    return tokens / (time.perf_counter() - begin)


def soak(server: Server, minutes: float) -> tuple[Counter[str], float]:
    """What became of the requests, and by how many MB the process has grown since its first minute."""
    found: Counter[str] = Counter()
    lock, end = threading.Lock(), time.monotonic() + 60 * minutes
    early = threading.Timer(min(60.0, 20 * minutes), lambda: sizes.append(server.memory_mb()))
    sizes: list[float] = []

    def client(number: int) -> None:
        source = random.Random(number)
        while time.monotonic() < end:
            kind = source.choice(["whole", "stream", "leaves", "garbage", "refused", "unread"])
            try:
                outcome = _ask(server, kind, source)
            except (httpx.HTTPError, OSError, ValueError) as error:
                outcome = f"lost: {type(error).__name__}"
            with lock:
                found[f"{kind}: {outcome}"] += 1

    early.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    early.join()
    while any(server.state()[name] for name in ("running", "queued")):
        time.sleep(0.1)
    return found, server.memory_mb() - sizes[0]


def _ask(server: Server, kind: str, source: random.Random) -> str:
    body = {"prompt": "def main(" * source.randint(1, 8), "gen_length": 32, "block_length": 8, "steps": 4}
    address = f"{server.url}/v1/completions"
    if kind in ("leaves", "unread"):
        content = json.dumps({**body, "stream": kind == "unread" or source.random() < 0.5}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        wire = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        with closing(wire):
            wire.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            time.sleep(source.random() * (2.0 if kind == "unread" else 0.3))
        return "left"
    if kind == "garbage":
        answer = httpx.post(address, content=os.urandom(500), headers={"Content-Type": "application/json"}, timeout=600)
        return "as expected" if answer.status_code == 400 else f"lost: {answer.status_code}"
    if kind == "refused":
        answer = httpx.post(address, json={**body, "lenght": 3}, timeout=600)
        return "as expected" if answer.status_code == 400 else f"lost: {answer.status_code}"
    body["cache"] = source.choice(["none", "prefix", "dual"])
    if kind == "whole":
        answer = httpx.post(address, json=body, timeout=600)
        return "answered" if answer.json()["choices"][0]["finish_reason"] else "lost: no end"
    lines = httpx.post(address, json={**body, "stream": True}, timeout=600).text.split("\n\n")
    return "answered" if lines[-2] == "data: [DONE]" else "lost: no end"


def main(
    checkpoint: Annotated[str, typer.Option(help="As of `illada serve`.")],
    tokenizer: Annotated[str | None, typer.Option(help="As of `illada serve`.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    minutes: Annotated[float, typer.Option(help="Of the soak.")] = 10.0,
    rounds: Annotated[int, typer.Option()] = 3,
    gen_length: Annotated[int, typer.Option()] = 64,
    block_length: Annotated[int, typer.Option()] = 8,
    cache: Annotated[str, typer.Option()] = "dual",
) -> None:
    """Measure, show, and end with a line of JSON."""
    body = {"prompt": "def main(argument):\n" * 4, "eos": "never", "gen_length": gen_length, "cache": cache}
    body |= {"block_length": block_length, "steps": min(32, block_length)}
    server = Server(checkpoint, tokenizer, device)
    try:
        tokens_per_second(server, CLIENTS, 1, body)
        pairs = [[tokens_per_second(server, clients, 2, body) for clients in (1, CLIENTS)] for _ in range(rounds)]
        found, grown = soak(server, minutes)
    finally:
        code = server.end()
    lost = sum(count for outcome, count in found.items() if "lost" in outcome)
    bars = {
        "tokens a second, 8 clients over one": at_least(RATIO, median(many / one for one, many in pairs), pairs=pairs),
        "requests lost": at_most(0, lost, outcomes=dict(found)),
        "MB more than after the first minute": at_most(GROWTH_MB, grown),
        "exit code": at_most(0, abs(code)),
    }
    show_bars(Console(), bars)
    print(json.dumps({"minutes": minutes, "body": body, "cpus": os.cpu_count(), **verdict(bars)}))


if __name__ == "__main__":
    typer.run(main)

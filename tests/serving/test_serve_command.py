"""`illada serve` in a process of its own: its start, its signals, its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from launch import ROOT, Illada

LONG = {"prompt": "a", "gen_length": 500, "block_length": 500, "steps": 500, "eos": "never"}


@contextmanager
def started(place: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "illada_megatron", "serve", "--checkpoint", str(place / "run"), "--port", "0"]
    command += ["--tokenizer", str(place / "tokenizer.json"), "--device", "cpu", *arguments]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield process, line.rpartition(" ")[2].strip()
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def asked(url: str, body: dict[str, Any], answers: list[httpx.Response]) -> threading.Thread:
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=120))
    )
    thread.start()
    return thread


def wait_for(url: str, **state: int) -> None:
    while any(httpx.get(f"{url}/health").json()[name] < value for name, value in state.items()):
        pass


def test_sigterm_finishes_what_was_accepted(place: Path) -> None:
    with started(place, "--grace", "100", "--most-running", "2") as (process, url):
        answers: list[httpx.Response] = []
        body = {"prompt": "a", "gen_length": 60, "block_length": 60, "steps": 60}
        threads = [asked(url, body, answers) for _ in range(6)]
        wait_for(url, running=2, queued=4)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 6
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        assert ended(process) == (0, "")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_what_the_grace_is_not_enough_for_is_told(place: Path) -> None:
    with started(place, "--grace", "0.2", "--most-running", "1") as (process, url):
        answers: list[httpx.Response] = []
        threads = [asked(url, body, answers) for body in (LONG, LONG, {**LONG, "stream": True})]
        wait_for(url, running=1, queued=2)
        process.send_signal(signal.SIGINT)
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 503, 503]
        assert all("0.2 seconds were not enough" in answer.text for answer in answers)
        assert ended(process) == (0, "")


def test_defaults_and_keys(place: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    arguments = ("--api-key-file", str(tmp_path / "keys"), "--default", "gen_length=3", "--default", "reveal=threshold")
    with started(place, *arguments, "--name", "mine") as (process, url):
        body = {"model": "mine", "prompt": "a", "eos": "never"}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        answer = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer two"})
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert httpx.get(f"{url}/health", headers={"Host": "evil.com"}).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "all who reach this machine could ask: give an API key"),
        (["--host", "no.such.name.invalid"], "give an address of this machine"),
        (["--default", "lenght=3"], "expected FIELD=VALUE, FIELD one of block_length"),
        (["--port", "0", "--default", "regex=(a"], "--default: regex '(a': "),
        (
            ["--port", "0", "--default", 'json_schema={"minimum": 3}'],
            "--default: json_schema is none that a regular expression",
        ),
        (["--default", "steps=64"], "steps 64 exceeds block_length 32"),
        (["--api-key-file", "EMPTY"], "holds no key"),
        (["--port", "TAKEN"], "Address already in use: give another"),
    ],
)
def test_refused(arguments: list[str], message: str, place: Path, tmp_path: Path, illada: Illada) -> None:
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        values = {"EMPTY": str(tmp_path / "empty"), "TAKEN": str(other.getsockname()[1])}
        own = ("--checkpoint", place / "run", "--tokenizer", place / "tokenizer.json", "--device", "cpu")
        outcome = illada("serve", *own, *[values.get(one, one) for one in arguments])
    assert outcome.code == 2
    assert message in outcome.err


def test_several_ranks_are_refused(place: Path, illada: Illada, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    outcome = illada("serve", "--checkpoint", place / "run")
    assert (outcome.code, "of one rank, found 2" in outcome.err) == (2, True)


def test_what_is_not_installed_is_named(place: Path, illada: Illada, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("illada_megatron.cli.serve_command._NEEDED", ("re2", "a_package_that_nobody_has"))
    outcome = illada("serve", "--checkpoint", place / "run")
    assert outcome.code == 2
    assert "illada serve needs a_package_that_nobody_has: pip install 'illada-megatron[serve]'" in outcome.err


def test_every_setting_can_be_asked_for() -> None:
    """A field of Settings that requests cannot give would be forgotten by the next who adds one."""
    from dataclasses import fields

    from illada_megatron.generation import Settings
    from illada_megatron.serving.bodies import ChatBody, CompletionBody

    for body in (ChatBody, CompletionBody):
        assert {field.name for field in fields(Settings)} <= body.model_fields.keys()
        assert json.dumps(body.model_json_schema())

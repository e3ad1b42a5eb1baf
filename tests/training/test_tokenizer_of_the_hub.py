"""A tokenizer on the Hugging Face hub: a run's ranks on one machine ask once, and know together what came of it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from launch import launch


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """(URL of a hub that has nothing, paths of the tokenizer that it is asked for)."""
    paths: list[str] = []

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/org/words" in self.path:  # the library has questions of its own beside
                paths.append(self.path.partition("?")[0])
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", paths
    server.shutdown()
    server.server_close()


def test_one_rank_asks_for_all(
    asked: tuple[str, list[str]], tiny_run: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of a machine are told by its host's name."""
    hub, paths = asked
    for name, value in {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    run = launch("train", [*tiny_run, "data.tokenizer_path=org/words"], nproc=2)
    assert run.process.returncode != 0
    assert paths == ["/api/models/org/words"]
    assert run.output.count(f"the hub ({hub}) says") == 2, run.output

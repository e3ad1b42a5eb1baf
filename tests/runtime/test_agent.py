"""The restart policy, on ranks that are short scripts: what is started again, and what is left behind."""

import signal
import sys
import uuid
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.agent.server import RunResult, WorkerSpec
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from illada_megatron.runtime import loopback
from illada_megatron.runtime.agent import Agent

PORT = """
import os, pathlib, sys
pathlib.Path(sys.argv[1]).write_text(os.environ["MASTER_PORT"])
"""
NAMES = """
import os, pathlib, sys
with pathlib.Path(sys.argv[1]).open("a") as file:
    file.write(os.environ.get("ILLADA_RUN", "") + "\\n")
sys.exit(1)
"""
LEAVES_A_CHILD = """
import os, pathlib, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with pathlib.Path(sys.argv[1]).open("a") as file:
    file.write(f"{child.pid}\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""
EXITS = """
import pathlib, sys
with pathlib.Path(sys.argv[1]).open("a") as file:
    file.write("started\\n")
sys.exit(int(sys.argv[2]))
"""


KILLED_BESIDE = """
import os, pathlib, signal, sys, time
with pathlib.Path(sys.argv[1]).open("a") as file:
    file.write("started\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
if os.environ["LOCAL_RANK"] == "1":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


def _run(max_restarts: int, *arguments: str, ranks: int = 1, stop: bool = False, named: bool = True) -> RunResult:
    """Ranks `python -c ARGUMENTS` under the agent."""
    parameters = RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, 1, 1)
    handler = get_rendezvous_handler(parameters)
    spec = WorkerSpec(
        role="trainer",
        local_world_size=ranks,
        entrypoint=sys.executable,
        args=("-c", *arguments),
        rdzv_handler=handler,
        max_restarts=max_restarts,
    )
    agent = Agent(spec, several_nodes=False, named=named)
    agent.stop_requested = stop
    try:
        return agent.run()
    finally:
        handler.shutdown()


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's agent would take them from pytest
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGHUP")


def test_what_a_killed_rank_has_started_ends_with_it(tmp_path: Path) -> None:
    """At the end of the run and before each restart: two attempts, none of their children lives."""
    result = _run(1, LEAVES_A_CHILD, str(tmp_path / "children"))
    assert result.failures[0].exitcode == -signal.SIGKILL
    children = [int(line) for line in (tmp_path / "children").read_text().split()]
    assert len(children) == 2
    for pid in children:
        if psutil.pid_exists(pid):
            assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("code", "stop", "attempts"),
    [(1, False, 3), (2, False, 1), (3, False, 1), (1, True, 1), (0, False, 1)],
    ids=["a failure that may pass", "the user has to mend it", "bad steps", "told to stop", "success"],
)
def test_attempts(code: int, stop: bool, attempts: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = _run(2, EXITS, str(tmp_path / "started"), str(code), stop=stop)
    assert result.is_failed() == (code != 0)
    assert len((tmp_path / "started").read_text().split()) == attempts
    assert capfd.readouterr().err.count("start again") == attempts - 1


def test_what_the_others_exit_with_when_a_rank_is_killed(tmp_path: Path) -> None:
    """They may have met the loss in the middle of a save, and call that the user's."""
    result = _run(1, KILLED_BESIDE, str(tmp_path / "started"), ranks=2)
    assert {failure.exitcode for failure in result.failures.values()} == {2, -signal.SIGKILL}
    assert len((tmp_path / "started").read_text().split()) == 4


def test_a_run_without_a_name_gets_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same over restarts, another for another run: all that are not named meet as "illada"."""
    monkeypatch.delenv("ILLADA_RUN", raising=False)
    _run(2, NAMES, str(tmp_path / "first"), named=False)
    _run(1, NAMES, str(tmp_path / "second"), named=False)
    monkeypatch.delenv("ILLADA_RUN")
    _run(0, NAMES, str(tmp_path / "named"))
    first, second = (tmp_path / "first").read_text().split(), (tmp_path / "second").read_text().split()
    assert len(first) == 3
    assert len(second) == 2
    assert len({*first}) == len({*second}) == 1
    assert first[0] != second[0]
    assert (tmp_path / "named").read_text() == "\n"


def test_the_port_of_the_ranks_is_given_to_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "quiet_port", lambda *_: 12345)
    assert not _run(0, PORT, str(tmp_path / "port")).is_failed()
    assert (tmp_path / "port").read_text() == "12345"

"""Runs of one machine: no other machine reaches what their ranks find each other by."""

import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from corpus import write_corpus
from launch import SMALL, launch, rank_processes, wait_for_step

from illada_megatron.runtime import loopback


def _listening(process: psutil.Process) -> set[str]:
    """Addresses at which a process waits for others."""
    connections = process.net_connections(kind="tcp")
    return {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}


@pytest.mark.skipif(sys.platform != "linux", reason="psutil sees other processes' sockets there")
def test_the_ranks_of_one_machine_listen_on_the_loopback(tmp_path: Path) -> None:
    """torch's stores, of the launcher and of the ranks, and gloo's connections."""
    seen: dict[str, set[str]] = {}

    def look(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, 1, launcher)
        seen["launcher"] = _listening(launcher)
        for number, rank in enumerate(rank_processes(launcher)):
            seen[f"rank {number}"] = _listening(rank)
        launcher.terminate()

    jsonl = tmp_path / "log.jsonl"
    arguments = (*SMALL, "training.train_steps=1000000", f"data.train_paths=[{write_corpus(tmp_path / 'shard')}]")
    run = launch("train", arguments, nproc=2, jsonl=jsonl, interrupt=look)
    assert set(seen) == {"launcher", "rank 0", "rank 1"}, run.output
    assert seen["launcher"] == {loopback.ADDRESS}
    assert seen["rank 0"] == {loopback.ADDRESS}
    assert seen["rank 1"] <= {loopback.ADDRESS}


@pytest.mark.parametrize(
    ("local_world_size", "agent_store", "ours"),
    [(None, None, False), ("1", None, False), ("2", "True", False), ("2", "False", True), ("2", None, True)],
)
def test_which_runs_are_of_one_machine(
    local_world_size: str | None, agent_store: str | None, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks are here, and torchrun does not hold the store for them."""
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": local_world_size}
    host = loopback.hosted_store(0, timedelta(seconds=60))
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": agent_store, "MASTER_PORT": str(host.port)}
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    store = loopback.store_of_one_machine(timedelta(seconds=60))
    assert (store is not None) == ours
    if store is not None:
        store.set("said", "by a rank")
        assert host.get("said") == b"by a rank"


def test_a_port_that_is_taken_is_an_error() -> None:
    host = loopback.hosted_store(0, timedelta(seconds=60))
    with pytest.raises(OSError, match="in use"):
        loopback.hosted_store(host.port, timedelta(seconds=60))


@pytest.mark.skipif(sys.platform != "linux", reason="reads which ports the system gives")
def test_a_port_for_a_rank_that_is_yet_to_start() -> None:
    """None of those that connections get, which on a busy machine are soon taken."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if lowest < 11_000:
        pytest.skip("connections may get any port here")
    ports = [loopback.quiet_port() for _ in range(50)]
    assert all(10_000 <= port < lowest for port in ports)
    assert len(set(ports)) > 40
    store = loopback.hosted_store(ports[0], timedelta(seconds=5))
    assert store.port == ports[0]

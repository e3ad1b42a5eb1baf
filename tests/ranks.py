"""Ranks as plain processes, for tests that do something to one of them."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

from illada_megatron.runtime.loopback import quiet_port

_FORKS = multiprocessing.get_context("forkserver")
"""Of a process that has imported torch and megatron-core: most of what a short-lived rank would do."""


def start_ranks(worker: Callable[..., None], size: int, *arguments: Any) -> list[Any]:
    """Processes that call worker(rank, *arguments), with what a launcher puts into the environment. `worker` is at the
    top of its module; an exception in it is the process's exit code 1, with a traceback."""
    port, environment = quiet_port(), dict(os.environ)
    _FORKS.set_forkserver_preload(["illada_megatron.training.trainer", "pytest"])
    ranks = [
        _FORKS.Process(target=_rank, args=(rank, size, port, environment, worker, arguments), daemon=True)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def run_ranks(worker: Callable[..., None], size: int, *arguments: Any) -> None:
    """Start them and wait; fails where one of them does."""
    ranks = start_ranks(worker, size, *arguments)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * size


def _rank(
    rank: int,
    size: int,
    port: int,
    environment: dict[str, str],
    worker: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the server's, which may have begun before the test that asks
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    worker(rank, *arguments)
    # As `illada` does (illada_megatron/__main__.py): gloo's threads may abort an interpreter that is taken apart.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

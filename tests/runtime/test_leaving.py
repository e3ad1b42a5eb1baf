"""The end of a run: rank 0 holds the store by which the ranks have found each other."""

import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from ranks import run_ranks

from illada_megatron.config import load_config
from illada_megatron.runtime import distributed, runtime


def _worker(rank: int, arguments: tuple[str, ...]) -> None:
    with runtime(load_config(None, [*arguments, "training.global_batch_size=6"])):
        store = dist.distributed_c10d._get_default_store()
        if rank == 0:
            store.set("the last news", "all is saved")
        else:
            time.sleep(3 * rank)
            assert store.get("the last news") == b"all is saved"


def test_rank_0_leaves_last(tiny_run: tuple[str, ...]) -> None:
    """The others' threads that save hear from its store what became of the last one."""
    run_ranks(_worker, 3, tiny_run)


_HOST = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_a_store_that_does_not_answer_is_left_alone(
    rank: int, end: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine was cut off when all was done: no reason to wait for hours, or to fail."""
    monkeypatch.setattr(distributed, "_LEAVE_SECONDS", 0.5)
    with subprocess.Popen([sys.executable, "-c", _HOST], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        store = dist.TCPStore("127.0.0.1", int(host.stdout.readline()))
        store.set("a", "b")
        host.send_signal(end)
        distributed._let_the_others_go_first(store, rank, 2)
        host.kill()

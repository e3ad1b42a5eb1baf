"""The end of a run: rank 0 holds the store by which the ranks have found each other."""

import time

import torch.distributed as dist
from ranks import run_ranks

from illada_megatron.config import load_config
from illada_megatron.runtime import runtime


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

"""Start the ranks of one machine, through torch's own elastic launcher."""

import contextlib
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from types import FrameType

import psutil


def launch_ranks(nproc: int, arguments: Sequence[str]) -> None:
    """Run `python -m illada_megatron ARGUMENTS` on `nproc` ranks of this machine, wait, and exit with their status.

    The same as `python -m torch.distributed.run --standalone --nproc-per-node NPROC -m illada_megatron ARGUMENTS`,
    which several machines use with their rendezvous options; except that SIGTERM and SIGINT are handed on to the ranks,
    which save and leave with 0 in their own time, where torch's launcher kills them after 30 seconds and fails.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _hand_on)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        max_restarts=0,
        signals_to_handle="SIGHUP",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "illada_megatron", *arguments)
    except ChildFailedError as error:
        _end_orphans([failure.pid for failure in error.failures.values()])
        # The rank has said why; the launcher's traceback would only bury it.
        rank, failure = error.get_first_failure()
        print(f"rank {rank} failed first, with exit code {failure.exitcode}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)


def _end_orphans(ranks: Sequence[int]) -> None:
    """megatron-core's checkpoint writers outlive a rank that was killed, and keep the terminal's pipe open. torch gives
    each rank a process group of its own."""
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _hand_on(number: int, _: FrameType | None) -> None:
    for child in psutil.Process().children():
        child.send_signal(number)

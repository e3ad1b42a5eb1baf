"""Start the ranks of one machine, and start them again when one fails, through torch's own elastic agent."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import cast

import psutil
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from illada_megatron.runtime import loopback
from illada_megatron.runtime.agent import END_OF_RUN, Agent, decisive, shutdown_seconds
from illada_megatron.runtime.spares import WithSpares
from illada_megatron.runtime.tables import tell

SHARED_ID = "illada"
"""--rdzv-id where several machines are to meet and the user has named none."""
# torch's own for its stores of rendezvous
_STORE_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class LaunchOptions:
    """What torchrun calls by the same names."""

    nproc: int = 1
    """Ranks on this machine."""
    min_nodes: int = 1
    max_nodes: int = 1
    rdzv_endpoint: str | None = None
    """HOST:PORT; the machine of that name holds the store through which the others find each other. None: there are no
    others, and nobody but this machine reaches the store."""
    rdzv_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    rdzv_conf: Mapping[str, str] = field(default_factory=dict)
    """join_timeout, last_call_timeout, keep_alive_interval, keep_alive_max_attempt, read_timeout (seconds), is_host."""
    local_addr: str | None = None
    """By which the other machines reach this one; None: its host name."""
    max_restarts: int = 0
    """How often a failure may start the ranks of this machine again; machines that come or go do not count."""


def launch_ranks(options: LaunchOptions, arguments: Sequence[str], working: Callable[[int], int] | None = None) -> None:
    """Run `python -m illada_megatron ARGUMENTS` on the ranks of this machine, wait, and exit with their status.

    working: how many machines work, of so many that are there, where options allow several numbers; ValueError: no
    number does. None: all.

    The same as `python -m torch.distributed.run --rdzv-backend c10d ... -m illada_megatron ARGUMENTS`, except that
    SIGTERM and SIGINT are handed on to the ranks, which save and leave with 0 in their own time, where torch's launcher
    kills them after 30 seconds and fails; that nothing of a failed rank lives on; and that an error which would only
    come again (exit codes 2 and 3) is not met with a restart.
    """
    # Else an agent goes on telling its ranks the address of the first rank 0 when that machine is lost:
    # https://github.com/pytorch/pytorch/issues/135712
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP"
    sys.exit(_run(options, arguments, working))


def _run(options: LaunchOptions, arguments: Sequence[str], working: Callable[[int], int] | None) -> int:
    """The exit status."""
    agent = None
    handler: RendezvousHandler | None = None
    received = 0

    def hand_on(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        # torch's word on a rank that ends by it; this program says what has happened
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        if agent is not None:
            agent.stop_requested = True
        if isinstance(handler, WithSpares) and handler.is_spare:
            handler.leave(signal.Signals(number))
            return
        children = psutil.Process().children()
        if not children:  # in a rendezvous: nobody to tell
            raise SignalException(f"got {signal.Signals(number).name}", signal.Signals(number))
        for child in children:
            child.send_signal(_handed_on(number))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, hand_on)
    try:
        handler = _rendezvous(options)
        if working is not None and options.min_nodes < options.max_nodes:
            handler = WithSpares(cast(DynamicRendezvousHandler, handler), working, shutdown_seconds())
        agent = Agent(
            WorkerSpec(
                role="trainer",
                local_world_size=options.nproc,
                entrypoint=sys.executable,
                args=("-u", "-m", "illada_megatron", *arguments),
                rdzv_handler=handler,
                max_restarts=options.max_restarts,
                local_addr=options.local_addr,
            ),
            several_nodes=options.max_nodes > 1,
            named=options.rdzv_id != SHARED_ID,
        )
        result = agent.run()
    except SignalException as error:
        return 128 + error.sigval  # the rendezvous stays open: the other machines may go on
    except RendezvousError as error:
        tell(f"illada: error: {_explain(error, options)}")
        return 1
    failed = result is not None and result.is_failed()
    final = decisive(result.failures) if result is not None else None
    # Where the run may go on with fewer machines, one whose data is not mounted is no reason to end it.
    alone = failed and options.min_nodes < options.max_nodes and (final is None or final.exitcode != END_OF_RUN)
    if handler is not None and not alone:
        handler.shutdown()
    if not failed:  # no result: a spare machine, when the others have ended the run
        return 0
    if received and any(one.exitcode == -_handed_on(received) for one in result.failures.values()):
        # before the first step no rank catches it, for there is nothing to save; after a second one they have not saved
        name = signal.Signals(received).name
        tell(f"stopped by {name} before the ranks had begun, or had saved: the newest checkpoint is as it was")
        return 128 + received
    rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
    # The rank has said why; a traceback of the launcher would only bury it.
    tell(f"rank {rank} failed first, with exit code {failure.exitcode}")
    failure = final or failure
    return failure.exitcode if failure.exitcode > 0 else 1


def _handed_on(number: int) -> int:
    """What ranks get of a signal: while they start, Python answers SIGINT with a traceback; later they treat both
    alike."""
    return signal.SIGTERM if number == signal.SIGINT else number


def _rendezvous(options: LaunchOptions) -> RendezvousHandler:
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=options.rdzv_endpoint or "",
        run_id=options.rdzv_id,
        min_nodes=options.min_nodes,
        max_nodes=options.max_nodes,
        local_addr=options.local_addr if options.rdzv_endpoint else loopback.ADDRESS,
        **options.rdzv_conf,
    )
    if options.rdzv_endpoint:
        return get_rendezvous_handler(parameters)
    store = loopback.hosted_store(0, _STORE_TIMEOUT)
    return create_handler(store, C10dRendezvousBackend(store, options.rdzv_id), parameters)


def _explain(error: RendezvousError, options: LaunchOptions) -> str:
    where = f"the rendezvous at {options.rdzv_endpoint or loopback.ADDRESS} (--rdzv-id {options.rdzv_id})"
    if isinstance(error, RendezvousClosedError):
        return f"{where} is closed: another machine has ended the run or used up its restarts; its log says why"
    return f"{where} failed: {error or type(error).__name__}; is HOST:PORT up and reachable from this machine?"

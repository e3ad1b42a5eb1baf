"""torch's elastic agent with the restart policy of this program."""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Mapping
from typing import Any, cast

from torch.distributed import PrefixStore
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from illada_megatron.runtime import loopback
from illada_megatron.runtime.tables import tell

# What `illada` exits with where the user has to mend something, and where no machine of the run could go on: all ranks
# have found together that its steps are bad (cli/main.py).
USER_ERROR, END_OF_RUN = 2, 3
RUN = "ILLADA_RUN"
"""The ranks' variable with the name of the run, where the user gave none."""
# torch's agents ask the rendezvous for news at most once in this time.
_NEWS_SECONDS = 1.0
_PORT = "illada/port of rank 0"


def shutdown_seconds() -> int:
    """How long ranks that are told to leave may take, before they are killed; torchrun's variable and its default."""
    return int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def decisive(failures: Mapping[int, ProcessFailure]) -> ProcessFailure | None:
    """The failure for which another attempt would only fail in the same way, if there is one. Where a rank was killed,
    what the others exit with follows from that; SIGTERM is the agent's own."""
    codes = [failure.exitcode for failure in failures.values()]
    if any(code < 0 and code != -signal.SIGTERM for code in codes):
        return None
    final = [failure for failure in failures.values() if failure.exitcode in (USER_ERROR, END_OF_RUN)]
    return max(final, key=lambda failure: failure.exitcode, default=None)


class Agent(LocalElasticAgent):
    """Watches the ranks of this machine, and starts them again as `max_restarts` allows."""

    def __init__(self, spec: WorkerSpec, several_nodes: bool, named: bool = True) -> None:
        """named: the user has given the run a name (--rdzv-id) that no other has."""
        super().__init__(spec, DefaultLogsSpecs(), shutdown_timeout=shutdown_seconds())
        self._several_nodes, self._named = several_nodes, named
        self.stop_requested = False
        """A signal asked the ranks to save and leave: nothing is started again after it."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            if self.stop_requested or decisive(result.failures):
                self._remaining_restarts = 0
            self._say_what_follows(result, worker_group.spec.max_restarts)
        elif result.state == WorkerState.SUCCEEDED and not self.stop_requested and self._others_are_waiting():
            # Another agent has seen a machine that wants to join before this one did, and told its ranks to save and
            # leave; all ranks did so together. The run is not over: HEALTHY lets torch's loop look at who waits.
            return RunResult(state=WorkerState.HEALTHY)
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if not self._named:
            # the first that comes names the run, for as long as its rendezvous lives: by it an attempt that was cut off
            # and is back is told from another run (`checkpoint/owner.py`)
            store = cast(PrefixStore, worker_group.store).underlying_store
            os.environ[RUN] = store.compare_set("illada/run", "", uuid.uuid4().hex).decode()
        # torch's may be another's before rank 0 listens there, which takes seconds; the store is of this round alone
        if worker_group.group_rank == 0:
            port = loopback.quiet_port("" if self._several_nodes else loopback.ADDRESS)
            worker_group.store.set(_PORT, str(port))  # type: ignore[attr-defined]  # torch declares both None
        worker_group.master_port = int(worker_group.store.get(_PORT))  # type: ignore
        return super()._start_workers(worker_group)

    def _others_are_waiting(self) -> bool:
        if not self._several_nodes:
            return False
        time.sleep(_NEWS_SECONDS)
        return self._rdzv_handler.num_nodes_waiting() > 0

    def _say_what_follows(self, result: RunResult, max_restarts: int) -> None:
        rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
        if self._remaining_restarts > 0:
            attempt = max_restarts - self._remaining_restarts + 1
            tell(
                f"rank {rank} failed with exit code {failure.exitcode}: the ranks of this machine start again "
                f"(restart {attempt} of {max_restarts})"
            )

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002
        # Ranks that another machine makes start again save first: they have the user's time for it, not 30 seconds.
        self._shutdown(timeout=self._shutdown_timeout)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        ranks = list(self._pcontext.pids().values()) if self._pcontext is not None else []
        super()._shutdown(death_sig, timeout)
        # What a killed rank has started outlives it (writers of checkpoints), keeps its files and ports, and may still
        # write when the next attempt does. torch gives each rank a process group of its own.
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

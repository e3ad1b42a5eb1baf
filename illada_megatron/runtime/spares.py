"""Machines that are there and do not work: they wait in the rendezvous until they are needed.

torch's rendezvous makes a world of all machines that come. Where the run works on fewer (`config/machines.py`), those
with the highest numbers start no ranks: for their agents the rendezvous has not ended yet. The others see a smaller
world. Spare machines stay members of the rendezvous, send heartbeats, and hear what happens:

- a machine joins with which more can work, or one has failed and comes back: all agents meet again, the spare ones
  too, and choose anew;
- one that works is cut off: its heartbeats stop, and a spare one calls the others, long before their collectives end;
- the run is over: the rendezvous is closed.
"""

import signal
import time
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from illada_megatron.runtime.tables import tell

_NEWS_SECONDS = 1.0
# The machine that holds the store stays so long after the run, for those that still ask it whether the run is over.
_LAST_NEWS_SECONDS = 10.0


class WithSpares(RendezvousHandler):
    """torch's rendezvous, in which only as many machines work as the run can use."""

    def __init__(self, inner: DynamicRendezvousHandler, working: Callable[[int], int], leave_seconds: float) -> None:
        """working: machines that work, of so many that are there; leave_seconds: how long a spare machine that is
        told to stop waits for the end of the run, whose store it may hold."""
        self._inner, self._working, self._leave_seconds = inner, working, leave_seconds
        self._leave: SignalException | None = None
        self._leave_at = 0.0
        self._has_spares = False
        self._working_now = 0
        self.is_spare = False
        """This machine waits."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Return when this machine is to work. Raises RendezvousGracefulExitError when the run ends without it, and
        SignalException where it was told to stop."""
        while True:
            found = self._inner.next_rendezvous()
            try:
                working = self._working(found.world_size)
            except ValueError:  # no number of them can work: the ranks say why
                working = found.world_size
            self._has_spares, self._working_now = working < found.world_size, working
            if found.rank < working:
                address = found.bootstrap_store_info  # torch has it as None for other backends than c10d
                assert address is not None
                return RendezvousInfo(found.store, found.rank, working, address)
            tell(f"illada: this machine waits as a spare one: of {found.world_size} machines {working} work")
            self.is_spare = True
            self._wait()
            self.is_spare = False

    def leave(self, number: signal.Signals) -> None:
        """This machine, a spare one, is told to stop."""
        self._leave = SignalException(f"got {number.name}", number)
        self._leave_at = time.monotonic() + self._leave_seconds

    def _wait(self) -> None:
        """Until all agents meet again."""
        while True:
            if self._inner.is_closed():
                raise RendezvousGracefulExitError("the run is over")
            if self._leave is not None:
                if time.monotonic() > self._leave_at:
                    raise self._leave
            elif self.num_nodes_waiting() > 0 or self._lost_one():
                return
            time.sleep(_NEWS_SECONDS)

    def _lost_one(self) -> bool:
        """Whether the heartbeats of a machine that works have stopped. torch's agents do not look at that: they wait
        for what the machine's absence does to their ranks."""
        state = self._inner._state_holder.state
        return not set(range(self._working_now)) <= set(state.participants.values())

    def shutdown(self) -> bool:
        """End the run for all machines."""
        closed = self._inner.shutdown()
        if self._has_spares:
            time.sleep(_LAST_NEWS_SECONDS)
        return closed

    def get_backend(self) -> str:
        return self._inner.get_backend()

    @property
    def use_agent_store(self) -> bool:
        return self._inner.use_agent_store

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """Machines for which all meet again: not for one that could only be a spare, as where one comes and goes. It
        waits in the rendezvous until one that works is lost, or until its join_timeout."""
        waiting = self._inner.num_nodes_waiting()
        if waiting == 0 or self._lost_one():
            return waiting
        try:
            there = len(self._inner._state_holder.state.participants) + waiting
            working = self._working(min(there, self._inner.settings.max_nodes))
        except ValueError:
            return waiting
        return waiting if working != self._working_now else 0

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

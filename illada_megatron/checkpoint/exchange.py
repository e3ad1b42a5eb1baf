"""What the ranks' writing threads tell each other, through the store by which the ranks have found each other.

A process group of their own would connect each rank with every other (a socket for each), and a collective that waits
for a rank which does not answer cannot be given up. The store is one connection a rank, and is there already.
"""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from illada_megatron.checkpoint.files.agreement import rank_and_size

# Asked of the store, a second, by all ranks together.
_QUESTIONS = 4000
_SHORTEST_PAUSE_SECONDS = 0.01
# torch's store ends the connection of who sends 8 MiB at once.
_CHUNK_BYTES = 4 << 20


class Exchange:
    """Plain values (as JSON holds them) between rank 0 and the others; each topic is used once. name: the same on all
    ranks, and no other's. Not a collective: a thread may use it while the run's own collectives go on.

    Where the store is lost, RuntimeError is raised by torch.
    """

    def __init__(self, name: str) -> None:
        self.rank, self.size = rank_and_size()
        self._pause_seconds = max(_SHORTEST_PAUSE_SECONDS, self.size / _QUESTIONS)
        self._closed = threading.Event()
        self._store = None
        if self.size > 1:
            self._store = dist.PrefixStore(f"illada/{name}", dist.distributed_c10d._get_default_store())

    def close(self) -> None:
        """Whoever waits here gets RuntimeError: a thread that is within the store's C++ when the interpreter ends would
        abort the process."""
        self._closed.set()

    def told(self, topic: str, value: Any) -> Any:
        """Rank 0's value, on every rank, however long it takes to come."""
        if self._store is None:
            return value
        if self.rank == 0:
            self._put(topic, value)
            return value
        self._until(lambda: self._store.check([topic]))  # type: ignore[union-attr]
        return self._get(topic)

    def give(self, topic: str, value: Any) -> None:
        """Hand this rank's value to rank 0."""
        assert self._store is not None
        self._put(f"{topic}/{self.rank}", value)
        self._store.add(f"{topic}/given", 1)

    def take(self, topic: str, own: Any, until: float) -> tuple[list[Any], list[int]]:
        """On rank 0, whose own value is `own`: those that the others gave, in the order of the ranks, own first, and
        which ranks gave none until the time `until` (time.monotonic)."""
        if self._store is None:
            return [own], []
        others, given, store = range(1, self.size), f"{topic}/given", self._store
        in_time = self._until(lambda: store.add(given, 0) == len(others), until)
        if not in_time and (missing := [rank for rank in others if not store.check([f"{topic}/{rank}"])]):
            return [], missing
        values = [own]
        for rank in others:
            values.append(self._get(f"{topic}/{rank}"))
            self.forget(f"{topic}/{rank}")
        store.delete_key(given)
        return values, []

    def forget(self, topic: str) -> None:
        """On rank 0: every rank has heard of it, the store need not keep it."""
        if self._store is not None and self._store.check([topic]):
            for number in range(int(self._store.get(topic))):
                self._store.delete_key(f"{topic}/{number}")
            self._store.delete_key(topic)

    def _put(self, topic: str, value: Any) -> None:
        assert self._store is not None
        content = json.dumps(value).encode()
        chunks = [content[start : start + _CHUNK_BYTES] for start in range(0, len(content), _CHUNK_BYTES)]
        for number, chunk in enumerate(chunks):
            self._store.set(f"{topic}/{number}", chunk)  # type: ignore[arg-type]
        self._store.set(topic, str(len(chunks)))

    def _get(self, topic: str) -> Any:
        assert self._store is not None
        count = int(self._store.get(topic))
        return json.loads(b"".join(self._store.get(f"{topic}/{number}") for number in range(count)))

    def _until(self, there: Callable[[], bool], until: float | None = None) -> bool:
        """Whether it came to be. The store is asked again and again: a wait would keep it from other threads."""
        while not there():
            if until is not None and time.monotonic() > until:
                return False
            if self._closed.wait(self._pause_seconds):
                raise RuntimeError("the run ends, and does not wait for the other ranks")
        return True

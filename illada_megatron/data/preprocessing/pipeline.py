"""Stages of work at the same time, in order."""

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, TypeVar

Item = TypeVar("Item")
_LOOK_UP_SECONDS = 0.1


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def ahead(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """`items`, computed by a thread that is at most `depth` of them ahead; what it raises is raised here.

    Closing this generator ends the thread and closes `items`."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: object) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=_LOOK_UP_SECONDS)
                break
            except queue.Full:
                continue

    def work() -> None:
        last: object = _END
        try:
            with closing(items):
                for item in items:
                    put(item)
                    if closed.is_set():
                        break
        except BaseException as error:  # handed over to whoever reads, below
            last = _Failure(error)
        put(last)

    thread = threading.Thread(target=work, name="preprocess stage", daemon=True)
    thread.start()
    try:
        yield from _taken(ready)
    finally:
        closed.set()
        thread.join()


def _taken(ready: "queue.Queue[Any]") -> Iterator[Any]:
    while (item := ready.get()) is not _END:
        if isinstance(item, _Failure):
            raise item.error
        yield item

"""Work that is done ahead, in order, by threads."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prefetcher(Generic[Item, Result]):
    """Iterates over work(item) for each of `items`, in their order, with up to `depth` results computed ahead.

    Reading shards and drawing masks leave the GIL, so that threads work while the model computes. An exception of the
    work, or of `items`, is raised where the result would have come. Use it as a context, or call `close`.

    weight: of an item; none is taken while those of which no result was asked for weigh `most_weight` or more.
    wait_seconds: how long the consumer has waited for results since `take_wait_seconds` was last called."""

    def __init__(
        self,
        work: Callable[[Item], Result],
        items: Iterator[Item],
        threads: int,
        depth: int,
        weight: Callable[[Item], int] = lambda _: 0,
        most_weight: int = 1,
    ) -> None:
        self._work = work
        self._items = items
        self._depth = depth
        self._weight, self._most_weight = weight, most_weight
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="illada-data")
        self._pending: deque[tuple[Future[Result], int]] = deque()
        self.wait_seconds = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Result:
        self._fill()
        if not self._pending:
            raise StopIteration
        started = time.perf_counter()
        result = self._pending.popleft()[0].result()
        self.wait_seconds += time.perf_counter() - started
        self._fill()
        return result

    def take_wait_seconds(self) -> float:
        """The seconds waited so far; counting begins anew."""
        waited, self.wait_seconds = self.wait_seconds, 0.0
        return waited

    def close(self) -> None:
        """Drop what nobody asked for. Work that has begun is waited for."""
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        while len(self._pending) < self._depth and sum(weight for _, weight in self._pending) < self._most_weight:
            try:
                item = next(self._items)
            except StopIteration:
                return
            except Exception as error:  # raised by __next__, behind the results that came before
                failed: Future[Result] = Future()
                failed.set_exception(error)
                self._pending.append((failed, 0))
                self._items = iter(())
                return
            self._pending.append((self._pool.submit(self._work, item), self._weight(item)))

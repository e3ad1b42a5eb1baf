"""Prefetching: order, bound, exceptions, and what is left when it is closed."""

import threading
import time
from collections.abc import Iterator

import pytest

from illada_megatron.data.corpus.prefetch import Prefetcher


def test_results_come_in_order_whatever_the_threads_do() -> None:
    def work(item: int) -> int:
        time.sleep(0.001 * (item % 5))
        return item * item

    for threads in (1, 4):
        with Prefetcher(work, iter(range(100)), threads, depth=8) as results:
            assert list(results) == [item * item for item in range(100)]


def test_no_more_than_depth_is_made_ahead() -> None:
    """A slow step must not fill the memory with batches."""
    made: list[int] = []
    with Prefetcher(lambda item: made.append(item) or item, iter(range(1000)), threads=2, depth=5) as results:
        for consumed in range(1, 20):
            next(results)
            time.sleep(0.002)
            assert len(made) <= consumed + 5
        assert len(made) > 19, "nothing was made ahead"


def test_exception_comes_where_its_result_would_have() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item

    with Prefetcher(work, iter(range(10)), threads=2, depth=6) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="item 3"):
            next(results)


def test_an_exception_of_the_items_comes_behind_all_results() -> None:
    """What is finished is not lost for what cannot be read."""

    def items() -> Iterator[int]:
        yield from range(4)
        raise ValueError("item 4")

    for depth in (1, 3, 10):
        with Prefetcher(lambda item: item, items(), threads=2, depth=depth) as results:
            assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
            with pytest.raises(ValueError, match="item 4"):
                next(results)
            with pytest.raises(StopIteration):
                next(results)


def test_no_more_is_taken_than_the_weight_allows() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in (1, 1, 50, 1, 1, 1, 1, 1, 1, 1):
            taken.append(item)
            yield item

    with Prefetcher(lambda item: item, items(), threads=2, depth=6, weight=lambda item: item, most_weight=4) as results:
        ahead = []
        for _ in range(10):
            next(results)
            ahead.append(taken[len(ahead) + 1 :])
    # the first call takes 1, 1, 50; until 50 is asked for nothing more
    assert ahead == [[1, 50], [50], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1], [1, 1], [1], []]


def test_waiting_is_measured_once() -> None:
    with Prefetcher(lambda item: time.sleep(0.05) or item, iter(range(3)), threads=3, depth=3) as results:
        next(results)
        assert results.take_wait_seconds() >= 0.03
        assert results.take_wait_seconds() == 0.0


def test_closing_ends_the_threads() -> None:
    """A run that stops early must not leave threads that read on."""
    before = threading.active_count()
    prefetcher = Prefetcher(lambda item: item, iter(range(10**9)), threads=4, depth=100)
    next(prefetcher)
    prefetcher.close()
    assert threading.active_count() == before

"""Work on checkpoints divided among processes of this machine, with a progress bar over the bytes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from illada_megatron.checkpoint.errors import CheckpointError

# with the libraries in memory, what four processes hold stays below 1 GB
_MOST_BY_DEFAULT = 4
_shared: Any = None


class Pool:
    """Processes that know `shared`, and the bar of what they do."""

    def __init__(self, executor: ProcessPoolExecutor, progress: Progress, count: int) -> None:
        self._executor, self._progress, self.count = executor, progress, count

    def run(
        self, title: str, function: Callable[[Any, Any], Any], tasks: Sequence[Any], nbytes: Sequence[int]
    ) -> list[Any]:
        """function(shared, task) for all tasks, begun in their order; the results in that order too.

        nbytes: what each moves the bar by. What a task raises is raised here, and no further task begins; a process
        that dies raises CheckpointError.
        """
        bar = self._progress.add_task(title, total=max(1, sum(nbytes)))
        futures: dict[Future[Any], int] = {}
        try:
            for task, size in zip(tasks, nbytes, strict=True):
                futures[self._executor.submit(_call, function, task)] = size
            for future in as_completed(futures):
                future.result()
                self._progress.advance(bar, futures[future])
        except BrokenProcessPool as error:
            raise CheckpointError(
                "a process of the pool was killed (out of memory? use fewer --processes or a smaller --memory-mb)"
            ) from error
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]


def default_processes() -> int:
    """Two for each core of this process, as one of them waits for the disk; within reason."""
    return min(_MOST_BY_DEFAULT, 2 * len(os.sched_getaffinity(0)))


def prepare() -> ForkServerContext:
    """Begin to import torch in the process that the pool's are forked from: not from this one, which has threads, and
    once for all. A command calls it before it imports torch itself, so that both happen at the same time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "illada_megatron.checkpoint.rewriting"])
    forkserver.ensure_running()
    return context


@contextmanager
def pool(shared: Any, processes: int | None, show: bool | None = None) -> Iterator[Pool]:
    """Processes that have `shared`, a picklable value. processes None: `default_processes`. show: the bar;
    None: where stderr is a terminal."""
    count = processes or default_processes()
    context = prepare()
    console = Console(stderr=True)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        TimeRemainingColumn(),
    )
    show = console.is_terminal if show is None else show
    with (
        ProcessPoolExecutor(
            count, mp_context=context, initializer=_begin, initargs=(shared, dict(os.environ))
        ) as executor,
        Progress(*columns, console=console, disable=not show) as progress,
    ):
        yield Pool(executor, progress, count)


def _begin(shared: Any, environment: dict[str, str]) -> None:
    global _shared
    _shared = shared
    os.environ.update(environment)  # what it was forked from may be older
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A killed parent cannot tell its processes; what they write would get in the way of the next attempt."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[[Any, Any], Any], task: Any) -> Any:
    return function(_shared, task)

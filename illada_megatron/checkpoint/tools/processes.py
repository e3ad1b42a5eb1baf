"""Work on checkpoints divided among processes of this machine, with a progress bar over the bytes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.system.console import made_console

# with the libraries in memory, what four processes hold stays below 1 GB
_MOST_BY_DEFAULT = 4
_BAR_SECONDS = 0.2
_shared: Any = None
_moved: Any = None  # bytes that all tasks of the pool have moved
_of_this_task = 0


class Pool:
    """Processes that know `shared`, and the bar of what they do."""

    def __init__(self, executor: ProcessPoolExecutor, progress: Progress, moved_bytes: Any) -> None:
        self._executor, self._progress, self._moved = executor, progress, moved_bytes

    def run(
        self, title: str, function: Callable[[Any, Any], Any], tasks: Sequence[Any], nbytes: Sequence[int]
    ) -> list[Any]:
        """function(shared, task) for all tasks, begun in their order; the results in that order too.

        nbytes: what each moves the bar by, at its end or as it says by `moved`. What a task raises is raised here, and
        no further task begins; a process that dies raises CheckpointError.
        """
        bar = self._progress.add_task(title, total=max(1, sum(nbytes)))
        before = self._moved.get_obj().value  # without its lock: a process that was killed may hold it
        futures: list[Future[Any]] = []
        try:
            for task, size in zip(tasks, nbytes, strict=True):
                futures.append(self._executor.submit(_call, function, task, size))
            running = set(futures)
            while running:
                done, running = wait(running, _BAR_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                self._progress.update(bar, completed=self._moved.get_obj().value - before)
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_BY_DEFAULT, 2 * cores)


def prepare() -> ForkServerContext:
    """Begin to import torch in the process that the pool's are forked from: not from this one, which has threads, and
    once for all. A command calls it before it imports torch itself, so that both happen at the same time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "illada_megatron.checkpoint.tools.rewriting"])
    forkserver.ensure_running()
    return context


@contextmanager
def pool(shared: Any, processes: int | None, show: bool | None = None) -> Iterator[Pool]:
    """Processes that have `shared`, a picklable value. processes None: `default_processes`. show: the bar;
    None: where stderr is a terminal."""
    count = processes or default_processes()
    context = prepare()
    moved_bytes = context.Value("q")
    screen = made_console(stderr=True)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        TimeRemainingColumn(),
    )
    show = screen.is_terminal if show is None else show
    with (
        ProcessPoolExecutor(
            count, mp_context=context, initializer=_begin, initargs=(shared, moved_bytes, dict(os.environ))
        ) as executor,
        Progress(*columns, console=screen, disable=not show) as progress,
    ):
        yield Pool(executor, progress, moved_bytes)


def moved(nbytes: int) -> None:
    """Of a long task of a pool: so many more of its bytes are done."""
    global _of_this_task
    if _moved is not None:
        _of_this_task += nbytes
        with _moved.get_lock():
            _moved.value += nbytes


def _begin(shared: Any, moved_bytes: Any, environment: dict[str, str]) -> None:
    global _shared, _moved
    _shared, _moved = shared, moved_bytes
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


def _call(function: Callable[[Any, Any], Any], task: Any, nbytes: int) -> Any:
    global _of_this_task
    _of_this_task = 0
    result = function(_shared, task)
    moved(nbytes - _of_this_task)
    return result

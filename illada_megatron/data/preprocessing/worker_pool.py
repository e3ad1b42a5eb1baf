"""Worker processes of one machine: each takes the next task when it has done one.

A process with no thread but its main one, as the `illada` command's is, forks them: they begin with what it has
imported and opened, in its memory. Of others (whose threads hold locks that nobody in a child would let go) they are
plain commands: multiprocessing's "spawn" would import the caller's main module once in each."""

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import orjson

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.document_encoder import DocumentEncoder
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.preprocessing.records import TaskRecord
from illada_megatron.data.preprocessing.shard_task import Report, run_task
from illada_megatron.data.preprocessing.worker import work
from illada_megatron.data.shards.prefix_lock import NOTE_THREAD, release_locks
from illada_megatron.data.tokenizers.engine_libraries import OPENING_THREAD
from illada_megatron.data.tokenizers.tokenizer import forget_tokenizers
from illada_megatron.system.process import return_free_memory

_COMMAND = (sys.executable, "-m", "illada_megatron.data.preprocessing.worker")
_GIVE_UP_SECONDS = 30
_OWN_THREADS = {"MainThread", NOTE_THREAD}
"""Of which the second only waits, and touches a file now and then."""
_FORKABLE = {"jemalloc_bg_thd"}
"""Native threads by which a child is none the worse: jemalloc, gigatoken's, holds all its locks while a process forks,
and does this thread's work itself in the child."""
_LOOKS, _LOOK_SECONDS = 10, 0.001


def run_here(
    job: Job, tasks: Sequence[ShardTask], encoder: DocumentEncoder, report: Report
) -> Iterator[tuple[ShardTask, TaskRecord]]:
    """All tasks in this process, whose stages and engine use several cores by themselves."""
    for task in tasks:
        yield task, run_task(job, task, encoder, report)


class WorkerPool:
    """Processes that wait for tasks. Make it before anything starts a thread, a progress bar for example."""

    def __init__(
        self, job: Job, tasks: Sequence[ShardTask], workers: int, threads: int, say: Callable[..., None]
    ) -> None:
        """Start `workers` processes, no more than there are tasks, with engines of `threads` threads, and choose the
        engine; `say` is told. Raises DataError, OSError."""
        self._waiting = list(reversed(tasks))
        self._at_work: dict[int, ShardTask] = {}
        self._messages: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._workers: list[_Commanded | _Forked] = []
        self._listeners: list[threading.Thread] = []
        # of the reference, and of numpy, of which it would start one for each core
        defaults = {"RAYON_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        try:
            if not _may_fork(OPENING_THREAD):  # they import what they need while an engine is chosen here
                self._workers += [_Commanded(threads, defaults) for _ in range(workers)]
            encoder = DocumentEncoder(job, threads, sample=tasks[0])
            say(*encoder.report)
            forget_tokenizers()
            return_free_memory()  # to choose has taken some 50 MB
            self._job = job.model_copy(update={"engine": encoder.engine_name})
            if not self._workers and not _may_fork():  # an input's library may have started threads
                self._workers += [_Commanded(threads, defaults) for _ in range(workers)]
            elif not self._workers:
                for _ in range(workers):
                    self._workers.append(_Forked(threads, defaults, encoder, self._workers))
        except BaseException:
            self.close()
            raise

    def run(self, report: Report) -> Iterator[tuple[ShardTask, TaskRecord]]:
        """All tasks, as they finish.

        Raises DataError when a task fails or a worker dies, OSError where the system has failed; the other workers then
        give up what they are at."""
        for number, worker in enumerate(self._workers):
            self._listeners.append(threading.Thread(target=self._listen, args=(number,), daemon=True))
            self._listeners[-1].start()
            _send(worker, self._job.model_dump_json())
            self._next_task(number)
        while self._at_work:
            number, message = self._messages.get()
            if message is None:
                if number in self._at_work:
                    raise self._death(number)
                continue
            if "error" in message:
                raise DataError(message["error"])
            if "system_error" in message:
                raise OSError(*message["system_error"])
            if "done" in message:
                task = self._at_work.pop(number)
                self._next_task(number)
                yield task, TaskRecord.model_validate_json(orjson.dumps(message["done"]))
            else:
                report(message["read_bytes"], message["tokens"])

    def close(self) -> None:
        """End the workers: politely, then not."""
        for worker in self._workers:
            with suppress(BrokenPipeError):  # it has died
                worker.requests.close()
        for worker in self._workers:
            if worker.status(_GIVE_UP_SECONDS) is None:
                worker.process.kill()
                worker.status()
        for listener in self._listeners:
            listener.join()
        for worker in self._workers:
            worker.answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, number: int) -> None:
        """In a thread: the messages of a worker, then None."""
        for line in self._workers[number].answers:
            if line.endswith(b"\n"):  # a killed worker may leave half of one
                self._messages.put((number, orjson.loads(line)))
        self._messages.put((number, None))

    def _next_task(self, number: int) -> None:
        if self._waiting:
            task = self._waiting.pop()
            self._at_work[number] = task
            _send(self._workers[number], task.model_dump_json())

    def _death(self, number: int) -> DataError:
        status = self._workers[number].status() or 0
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        reason = " (out of memory? use fewer --workers or a smaller --max-document-mb)" if status == -9 else ""
        task = self._at_work[number]
        return DataError(
            f"a worker {how}{reason} while it made shard {task.name or 'PREFIX'} from {task.pieces[0].file.path}; "
            "finished shards are kept: run the same command again, without --overwrite, to continue"
        )


class _Commanded:
    """A worker that is a command."""

    def __init__(self, threads: int, defaults: Mapping[str, str]) -> None:
        # to look for pydantic's plugins takes a tenth of its start
        others = {"PYDANTIC_DISABLE_PLUGINS": "__all__", **os.environ, "PYTHONPATH": _import_path()}
        self.process = subprocess.Popen(
            [*_COMMAND, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**defaults, **others},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def status(self, seconds: float | None = None) -> int | None:
        """Its exit status; None: after so long it has none."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


class _Forked:
    """A worker that is a copy of this process, without the pipes of the `others` before it: a worker sees that this
    process has ended by its pipe's end."""

    def __init__(
        self,
        threads: int,
        defaults: Mapping[str, str],
        encoder: DocumentEncoder,
        others: "Sequence[_Commanded | _Forked]",
    ) -> None:
        (requests, our_requests), (our_answers, answers) = os.pipe(), os.pipe()
        self.requests, self.answers = os.fdopen(our_requests, "wb"), os.fdopen(our_answers, "rb")

        def run() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            release_locks()  # else they would be held until the last worker has ended, whatever becomes of this process
            os.dup2(2, 1)  # what a library prints is nothing that this process says
            for worker in (*others, self):
                worker.requests.close()
                worker.answers.close()
            os.environ.update({**defaults, **os.environ})  # libraries look when they first encode
            work(os.fdopen(requests, "rb"), os.fdopen(answers, "wb"), threads, encoder)

        self.process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads: `_may_fork` knows them
                self.process.start()
        except BaseException:
            self.requests.close()
            self.answers.close()
            raise
        finally:
            os.close(requests)
            os.close(answers)

    def status(self, seconds: float | None = None) -> int | None:
        """Its exit status; None: after so long it has none."""
        self.process.join(seconds)
        return self.process.exitcode


def _may_fork(*ending: str) -> bool:
    """Whether no thread but this one does anything, or those that are `ending`. The kernel is asked: Python does not
    know of libraries' own."""
    if multiprocessing.current_process().daemon:  # which multiprocessing gives no children
        return False
    for _ in range(_LOOKS):  # one that has ended for Python is there for the kernel a moment longer
        known = {thread.name for thread in threading.enumerate()}
        try:
            names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        except OSError:  # it has ended meanwhile
            continue
        if known <= {*_OWN_THREADS, *ending} and len([name for name in names if name not in _FORKABLE]) == len(known):
            return True
        time.sleep(_LOOK_SECONDS)
    return False


def _send(worker: _Commanded | _Forked, line: str) -> None:
    with suppress(BrokenPipeError):  # the worker has died: _listen says so
        worker.requests.write(line.encode() + b"\n")
        worker.requests.flush()


def _import_path() -> str:
    """What this process imports from, for a process started elsewhere."""
    return os.pathsep.join(path for path in sys.path if path)

"""Worker processes of one machine: each takes the next task when it has done one.

They are plain commands and not multiprocessing's children: those would import the caller's main module (with torch,
for the `illada` command) once in each process."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.document_encoder import DocumentEncoder
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.preprocessing.records import TaskRecord
from illada_megatron.data.preprocessing.shard_task import Report, run_task
from illada_megatron.data.preprocessing.worker import CHOOSES, ENGINE_IS_CHOSEN
from illada_megatron.data.tokenizers.engines import likely_engine
from illada_megatron.data.tokenizers.tokenizer import forget_tokenizers

_COMMAND = (sys.executable, "-m", "illada_megatron.data.preprocessing.worker")
_GIVE_UP_SECONDS = 30
# glibc keeps free memory in each arena: a worker was a third larger. And what it gave back between two batches it would
# have to ask for again, page by page.
_MALLOC_OF_ONE_THREAD = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}


def run_here(
    job: Job, tasks: Sequence[ShardTask], encoder: DocumentEncoder, report: Report
) -> Iterator[tuple[ShardTask, TaskRecord]]:
    """All tasks in this process, whose stages and engine use several cores by themselves."""
    for task in tasks:
        yield task, run_task(job, task, encoder, report)


def run_workers(
    job: Job, tasks: Sequence[ShardTask], workers: int, threads: int, say: Callable[..., None], report: Report
) -> Iterator[tuple[ShardTask, TaskRecord]]:
    """All tasks in `workers` processes with engines of `threads` threads, as they finish.

    Comparing engines with the reference takes a second or more, and opening one half a second. So the first worker
    chooses, by texts of its own task. Meanwhile the others have begun with the engine that is likely to be chosen; no
    shard is finished before it is. Where another is chosen all begin anew. `say` is told.

    Raises DataError when a task fails or a worker dies, OSError where the system has failed; the other workers then
    give up what they are at."""
    likely = job.engine
    if not job.chat:
        likely = likely_engine(Path(job.tokenizer_path), job.tokenizer_sha256, job.engine)
    forget_tokenizers()  # the workers load their own
    pool = _Pool(job, likely, tasks, workers, threads)
    try:
        chosen, chosen_report = pool.choice()
        say(*chosen_report)
        if chosen != likely and not job.chat:
            pool.close()
            pool = _Pool(job.model_copy(update={"engine": chosen}), None, tasks, workers, threads)
        yield from pool.run(report)
    finally:
        pool.close()


class _Pool:
    """Workers that have begun, but finish no shard before `run`."""

    def __init__(self, job: Job, likely: str | None, tasks: Sequence[ShardTask], workers: int, threads: int) -> None:
        """likely: the first worker chooses as job.engine says, the others begin with this one; None: job.engine is
        chosen. There are no more workers than tasks."""
        # of the reference, and of numpy, of which it would start one for each core
        defaults = {"RAYON_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        defaults["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # to look for them takes a tenth of a worker's start
        if threads == 1:
            defaults |= _MALLOC_OF_ONE_THREAD
        environment = {**defaults, **os.environ, "PYTHONPATH": _import_path()}
        self._waiting = list(reversed(tasks))
        self._at_work: dict[int, ShardTask] = {}
        self._messages: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._early: list[tuple[int, dict[str, Any] | None]] = []
        for number in range(workers):
            chooses = number == 0 and likely is not None
            command = [*_COMMAND, str(threads), *([CHOOSES] if chooses else [])]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
            )
            self._processes.append(process)
            self._threads.append(threading.Thread(target=self._listen, args=(number,), daemon=True))
            self._threads[-1].start()
            own = job if chooses or likely is None else job.model_copy(update={"engine": likely})
            self._send(number, own.model_dump_json().encode())
            self._next_task(number)

    def choice(self) -> tuple[str, list[str]]:
        """The engine that the first worker has chosen, and what it says of it."""
        while True:
            number, message = self._messages.get()
            if number != 0:
                self._early.append((number, message))
            elif message is None:
                raise self._death(number)
            elif "engine" in message:
                return message["engine"], message["report"]
            else:
                _raise_if_failed(message)
                self._early.append((number, message))

    def run(self, report: Report) -> Iterator[tuple[ShardTask, TaskRecord]]:
        """All tasks, with the engine that is chosen."""
        for number in range(len(self._processes)):
            self._send(number, ENGINE_IS_CHOSEN)
        for early in self._early:
            self._messages.put(early)
        while self._at_work:
            number, message = self._messages.get()
            if message is None:
                if number in self._at_work:
                    raise self._death(number)
                continue
            _raise_if_failed(message)
            if "done" in message:
                task = self._at_work.pop(number)
                self._next_task(number)
                yield task, TaskRecord.model_validate_json(orjson.dumps(message["done"]))
            else:
                report(message["read_bytes"], message["tokens"])

    def close(self) -> None:
        """End the workers: politely, then not."""
        for process in self._processes:
            if process.stdin:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_GIVE_UP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()

    def _listen(self, number: int) -> None:
        """In a thread: the messages of a worker, then None."""
        stdout = self._processes[number].stdout
        assert stdout is not None
        with os.fdopen(os.dup(stdout.fileno()), "rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # a killed worker may leave half of one
                    self._messages.put((number, orjson.loads(line)))
        stdout.close()
        self._messages.put((number, None))

    def _next_task(self, number: int) -> None:
        if self._waiting:
            task = self._waiting.pop()
            self._at_work[number] = task
            self._send(number, task.model_dump_json().encode())

    def _send(self, number: int, line: bytes) -> None:
        stdin = self._processes[number].stdin
        assert stdin is not None
        left = memoryview(line + b"\n")
        try:
            while left:
                left = left[stdin.write(left) :]
        except BrokenPipeError:
            return  # the worker has died: _listen says so

    def _death(self, number: int) -> DataError:
        status = self._processes[number].wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        reason = " (out of memory? use fewer --workers or a smaller --max-document-mb)" if status == -9 else ""
        task = self._at_work[number]
        return DataError(
            f"a worker {how}{reason} while it made shard {task.name or 'PREFIX'} from {task.pieces[0].file.path}; "
            "finished shards are kept: run the same command again, without --overwrite, to continue"
        )


def _raise_if_failed(message: dict[str, Any]) -> None:
    if "error" in message:
        raise DataError(message["error"])
    if "system_error" in message:
        raise OSError(*message["system_error"])


def _import_path() -> str:
    """What this process imports from, for a process started elsewhere."""
    return os.pathsep.join(path for path in sys.path if path)

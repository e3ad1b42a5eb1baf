"""A worker process, started by worker_pool.py: forked from it, or `python -m illada_megatron.data.preprocessing.worker
THREADS` of its own.

Reads a job, then tasks, one JSON object a line, from a pipe; answers with messages on another. It imports the data side
only. When the requests end, the parent is gone or wants no more: the task at hand is given up and what it wrote
removed."""

import gc
import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn

import orjson

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.document_encoder import DocumentEncoder
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.preprocessing.shard_task import run_task
from illada_megatron.data.tokenizers.tokenizer import forget_tokenizers
from illada_megatron.system.process import keep_free_memory


class _GivenUpError(Exception):
    """The parent does not want this task any more."""


class _Worker:
    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests = requests
        self._answers = answers
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._ended = threading.Event()

    def listen(self) -> None:
        """In a thread: the requests to the queue."""
        for line in self._requests:
            self._lines.put(line)
        self._ended.set()
        self._lines.put(None)

    def run(self, threads: int, encoder: DocumentEncoder | None) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        first = self._lines.get()
        if first is None:
            return
        job, task = Job.model_validate_json(first), self._next_task()
        if task is None:
            return
        if encoder is None:
            try:
                encoder = DocumentEncoder(job, threads)
            except (DataError, OSError) as error:
                self._answer(_told(error))
                return
            forget_tokenizers()  # the encoder has what it needs
        while task is not None:
            try:
                record = run_task(job, task, encoder, self._report)
            except _GivenUpError:
                return
            except (DataError, OSError) as error:
                self._answer(_told(error))
            else:
                self._answer({"done": record.model_dump(mode="json")})
            task = self._next_task()

    def _next_task(self) -> ShardTask | None:
        """None: the parent wants no more."""
        line = self._lines.get()
        return None if line is None or self._ended.is_set() else ShardTask.model_validate_json(line)

    def _report(self, read_bytes: int, tokens: int) -> None:
        if self._ended.is_set():
            raise _GivenUpError
        self._answer({"read_bytes": read_bytes, "tokens": tokens})

    def _answer(self, message: dict[str, object]) -> None:
        try:
            self._answers.write(orjson.dumps(message) + b"\n")
            self._answers.flush()
        except BrokenPipeError as error:
            raise _GivenUpError from error


def _told(error: DataError | OSError) -> dict[str, object]:
    """As a message. What the system has failed at may pass: the parent raises the same error."""
    return {"error": str(error)} if isinstance(error, DataError) else {"system_error": parts_of(error)}


def parts_of(error: OSError) -> list[Any]:
    """What OSError is made of again elsewhere, of the same class and with the same words."""
    if error.errno is None:
        return [str(error)]
    first, second = (
        name if name is None or isinstance(name, int) else os.fsdecode(name)
        for name in (error.filename, error.filename2)
    )
    return [error.errno, error.strerror, first, None, second]


def work(requests: BinaryIO, answers: BinaryIO, threads: int, encoder: DocumentEncoder | None) -> NoReturn:
    """A worker's life, from a process that is ready for it to its end. encoder: of the job, opened before; None: it
    is opened here."""
    # millions of short-lived objects, none in a cycle: looking for cycles among them would only cost time
    gc.disable()
    # Ctrl-C goes to all processes of a terminal: the parent then ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if threads == 1:
        keep_free_memory()
    code = 1
    try:
        with suppress(_GivenUpError):
            _Worker(requests, answers).run(threads, encoder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # the thread that listens may hold the pipe, for which an interpreter that is taken apart would wait, and abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    # what a library prints must not get between the messages
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    work(sys.stdin.buffer, answers, int(sys.argv[1]), None)


if __name__ == "__main__":
    main()

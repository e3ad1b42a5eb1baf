"""A worker process: `python -m illada_megatron.data.preprocessing.worker THREADS [choose]`, started by worker_pool.py.

Reads a job, then tasks, one JSON object a line, from stdin; answers with messages on stdout. It imports the data side
only. When stdin ends, the parent is gone or wants no more: the task at hand is given up and what it wrote removed."""

import gc
import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, BinaryIO

import orjson

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.document_encoder import DocumentEncoder
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.preprocessing.shard_task import run_task
from illada_megatron.data.tokenizers.tokenizer import forget_tokenizers
from illada_megatron.system.process import return_free_memory

ENGINE_IS_CHOSEN = b'"engine is chosen"'
"""A line on stdin: the engine that the job names is the one to use. Before it no shard is finished."""
CHOOSES = "choose"
"""An argument: this worker chooses the engine and answers with it; the job says how."""


class _GivenUpError(Exception):
    """The parent does not want this task any more."""


class _Worker:
    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._ended = threading.Event()
        self._chosen = threading.Event()

    def listen(self) -> None:
        """In a thread: stdin to the queue."""
        for line in sys.stdin.buffer:
            if line.rstrip() == ENGINE_IS_CHOSEN:
                self._chosen.set()
            else:
                self._lines.put(line)
        self._ended.set()
        self._chosen.set()
        self._lines.put(None)

    def run(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        first = self._lines.get()
        if first is None:
            return
        job, task = Job.model_validate_json(first), self._next_task()
        if task is None:
            return
        chooses = CHOOSES in sys.argv
        try:
            encoder = DocumentEncoder(job, int(sys.argv[1]), sample=task if chooses else None)
        except (DataError, OSError) as error:
            if not chooses:
                self._chosen.wait()  # with another engine it may be none
            self._answer(_told(error))
            return
        forget_tokenizers()  # the encoder has what it needs
        if chooses:  # which has taken some 50 MB
            return_free_memory()
            self._answer({"engine": encoder.engine_name, "report": encoder.report})
        encoder.wait_until_chosen = self._wait_until_chosen
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

    def _wait_until_chosen(self) -> None:
        self._chosen.wait()
        if self._ended.is_set():
            raise _GivenUpError

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


def main() -> None:
    # millions of short-lived objects, none in a cycle: looking for cycles among them would only cost time
    gc.disable()
    # Ctrl-C goes to all processes of a terminal: the parent then ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # what a library prints must not get between the messages
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    code = 1
    try:
        with suppress(_GivenUpError):
            _Worker(answers).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # the thread that listens may hold stdin, for which an interpreter that is taken apart would wait, and abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

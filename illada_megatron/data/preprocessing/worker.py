"""A worker process: `python -m illada_megatron.data.preprocessing.worker THREADS`, started by workers.py.

Reads a job, then tasks, one JSON object a line, from stdin; answers with messages on stdout. It imports the data side
only. When stdin ends, the parent is gone or wants no more: the task at hand is given up and what it wrote removed."""

import gc
import os
import queue
import signal
import sys
import threading
from typing import Any, BinaryIO

import orjson

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.preprocessing.shard import run_task
from illada_megatron.data.preprocessing.tokens import DocumentEncoder


class _GivenUpError(Exception):
    """The parent does not want this task any more."""


class _Worker:
    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._ended = threading.Event()

    def listen(self) -> None:
        """In a thread: stdin to the queue."""
        for line in sys.stdin.buffer:
            self._lines.put(line)
        self._ended.set()
        self._lines.put(None)

    def run(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        first = self._lines.get()
        if first is None:
            return
        try:
            job, encoder = self._prepare(orjson.loads(first))
        except (DataError, OSError) as error:
            self._answer({"error": str(error)})
            return
        while (line := self._lines.get()) is not None and not self._ended.is_set():
            task = ShardTask.model_validate_json(line)
            try:
                record = run_task(job, task, encoder, self._report)
            except _GivenUpError:
                return
            except (DataError, OSError) as error:
                self._answer({"error": str(error)})
            else:
                self._answer({"done": record.model_dump(mode="json")})

    def _prepare(self, start: dict[str, Any]) -> tuple[Job, DocumentEncoder]:
        """start: {"job": ..., "sample": a task to choose the engine by, or null}."""
        job = Job.model_validate(start["job"])
        sample = start["sample"] and ShardTask.model_validate(start["sample"])
        encoder = DocumentEncoder(job, int(sys.argv[1]), sample)
        if sample:
            self._answer({"engine": encoder.engine_name, "report": encoder.report})
        return job, encoder

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


def main() -> None:
    # millions of short-lived objects, none in a cycle: looking for cycles among them would only cost time
    gc.disable()
    # Ctrl-C goes to all processes of a terminal: the parent then ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # what a library prints must not get between the messages
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _Worker(answers).run()


if __name__ == "__main__":
    main()

"""The same shard tasks on a Ray cluster. Ray is optional: `pip install illada-megatron[ray]`.

All nodes must see inputs, tokenizer and output under the same paths (a shared file system)."""

import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.document_encoder import DocumentEncoder
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.preprocessing.records import TaskRecord
from illada_megatron.data.preprocessing.shard_task import Report, run_task
from illada_megatron.data.preprocessing.worker import parts_of

# a node that dies takes its tasks with it: Ray does them again on another
_RETRIES = 10
# of a task at a time: a million tasks are not handed to the scheduler at once
_SUBMITTED_PER_CPU = 2
_POLL_SECONDS = 1.0


def run_ray(
    job: Job, tasks: Sequence[ShardTask], address: str | None, report: Report
) -> Iterator[tuple[ShardTask, TaskRecord]]:
    """All tasks, one CPU each, as they finish. address: of a running cluster ("auto", "host:6379"); None: this
    machine alone, unless RAY_ADDRESS is set. A Ray that was started before is used and left running.

    Raises DataError when Ray is missing, or a task fails with one."""
    try:
        import ray
    except ImportError as error:
        raise DataError(
            "--engine ray needs Ray, which is not installed: pip install 'illada-megatron[ray]', or use --engine local"
        ) from error
    started = not ray.is_initialized()
    if started:
        before = signal.getsignal(signal.SIGTERM)
        # a task has a core, of the reference too, which would take all
        variables = {"PYTHONPATH": _import_path(), "RAYON_NUM_THREADS": "1"}
        ray.init(address=address, runtime_env={"env_vars": variables}, log_to_driver=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # which Ray has made its own
    remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(_run)
    try:
        yield from _drain(ray, remote, job, tasks, report)
    finally:
        if started:
            ray.shutdown()


def _drain(
    ray: Any, remote: Any, job: Job, tasks: Sequence[ShardTask], report: Report
) -> Iterator[tuple[ShardTask, TaskRecord]]:
    waiting = list(reversed(tasks))
    running: dict[Any, ShardTask] = {}
    while waiting or running:
        most = max(1, int(_SUBMITTED_PER_CPU * ray.cluster_resources().get("CPU", 1)))
        while waiting and len(running) < most:
            task = waiting.pop()
            running[remote.remote(job, task)] = task
        done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
        for reference in done:
            task = running.pop(reference)
            try:
                record = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, DataError):
                    raise DataError(str(error.cause)) from error
                if isinstance(error.cause, OSError):  # Ray's class of it holds the remote traceback as its text
                    raise OSError(*parts_of(error.cause)) from error
                raise
            report(task.size_bytes, sum(part.counts.tokens for part in record.parts))
            yield task, record


def _run(job: Job, task: ShardTask) -> TaskRecord:
    return run_task(job, task, _encoder(job.model_dump_json()), _no_report)


@functools.lru_cache(maxsize=1)
def _encoder(job_json: str) -> DocumentEncoder:
    """Once in each of Ray's worker processes."""
    return DocumentEncoder(Job.model_validate_json(job_json), threads=1)


def _no_report(read_bytes: int, tokens: int) -> None:  # noqa: ARG001 (Ray's tasks are counted when they are done)
    return


def _import_path() -> str:
    return os.pathsep.join(path for path in sys.path if path)

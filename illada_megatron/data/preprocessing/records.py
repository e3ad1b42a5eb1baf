"""Small files beside the shards that say what is finished: written after the shard, whole or not at all."""

from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.bad_places import MOST_BAD_PLACES, BadPlace
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.shards.durable import write_whole
from illada_megatron.data.shards.manifest import ShardEntry

_SUFFIX = ".done.json"
_IDX_HEADER_BYTES = 34
Record = TypeVar("Record", bound=BaseModel)


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Counts(_Stored):
    """What became of the documents of some part of the input."""

    documents: int = 0
    tokens: int = 0
    """End-of-document tokens included."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents' text, so that nats per token can be turned into bits per byte."""
    dropped: dict[str, int] = {}
    """Reason -> documents that were left out, as intended."""
    bad: dict[str, int] = {}
    """Reason -> lines that could not be used (skip_bad_lines)."""
    bad_places: tuple[BadPlace, ...] = ()
    """Of the first of those, in the order of the input."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
            dropped=_sum(self.dropped, other.dropped),
            bad=_sum(self.bad, other.bad),
            bad_places=(self.bad_places + other.bad_places)[:MOST_BAD_PLACES],
        )


def _sum(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {reason: first.get(reason, 0) + second.get(reason, 0) for reason in sorted(first | second)}


class PartRecord(_Stored):
    """One finished shard, or None where there was no document for it."""

    shard: ShardEntry | None
    counts: Counts


class TaskRecord(_Stored):
    """A finished task, or a finished part of a task."""

    fingerprint: str
    """Of the job."""
    parts: tuple[PartRecord, ...]


class JobRecord(_Stored):
    """PREFIX.job.json: whose the prefix is, and what came of it once the manifest is written."""

    fingerprint: str
    options: dict[str, object]
    finished: Counts | None = None
    shards: int = 0
    numbered_tasks: int = 0
    """Tasks whose shards have a number in their name: 0 up to this one, less one."""


def record_path(job: Job, name: str) -> Path:
    return Path(job.prefix + name + _SUFFIX)


def job_path(prefix: str) -> Path:
    return Path(prefix + ".job.json")


def manifest_path(prefix: str) -> Path:
    return Path(prefix + ".manifest.json")


def finished_task(job: Job, task: ShardTask) -> TaskRecord | None:
    """The record of `task`, if this job has finished it and its shards are there."""
    return _finished(job, task.name)


def finished_part(job: Job, task: ShardTask, part: int) -> PartRecord | None:
    """The same for one part of a streamed task."""
    record = _finished(job, task.part_name(part)) if task.streamed else None
    return record.parts[0] if record else None


def _finished(job: Job, name: str) -> TaskRecord | None:
    record = read_record(record_path(job, name), TaskRecord)
    if record is None or record.fingerprint != job.fingerprint:
        return None
    folder = Path(job.prefix).parent
    if any(part.shard and shard_problem(folder, part.shard) for part in record.parts):
        return None
    return record


def shard_problem(folder: Path, shard: ShardEntry) -> str | None:
    """What is wrong with the files of a shard by their sizes, nothing being read; None: nothing."""
    # a document is one sequence here; the layout of an index: csrc/indexed_dataset/builder.h
    idx_bytes = _IDX_HEADER_BYTES + shard.documents * (4 + 8) + (shard.documents + 1) * 8
    for end, expected in ((".bin", shard.tokens * np.dtype(shard.dtype).itemsize), (".idx", idx_bytes)):
        path = folder / f"{shard.path}{end}"
        if not path.is_file():
            return f"{path}: is missing"
        if (found := path.stat().st_size) != expected:
            return f"{path}: has {found} bytes, expected {expected}"
    return None


def require_claim(job: Job) -> None:
    """Raises DataError where the prefix is not this job's any more: by --overwrite, or because this process was taken
    for dead. It is asked before anything gets a name."""
    path = job_path(job.prefix)
    found = read_record(path, JobRecord)
    if found is None or found.fingerprint != job.fingerprint:
        whose = "is gone" if found is None else "is another job's"
        raise DataError(
            f"{path}: {whose}, expected the claim of this job, which has lost the prefix to another one: choose "
            "another output prefix"
        )


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """None where there is no such file; DataError where it is not what this package writes."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(
            f"{path}: expected a record of `illada preprocess`, found something else ({error.errors()[0]['msg']}): "
            "remove the file, or choose another output prefix"
        ) from error


def write_record(path: Path, record: BaseModel, replace: bool = True) -> None:
    """Whole or not at all, see `durable.write_whole`. replace False: raises DataError where there is another."""
    write_whole(path, record.model_dump_json(indent=1).encode() + b"\n", replace)

"""Whose an output prefix is: PREFIX.job.json is there from a job's start, so that two jobs never mix their shards."""

import errno
import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing import records
from illada_megatron.data.preprocessing.plan import Job
from illada_megatron.data.preprocessing.records import JobRecord
from illada_megatron.data.shards.manifest import read_manifest

# what this package writes behind a prefix
_NAMES = re.compile(r"(_\d{5,}(_\d{3,})?)?\.(bin|idx|done\.json)(\.tmp)?")
# what file systems without locks answer; there the names alone keep jobs apart
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def claimed_prefix(job: Job, overwrite: bool) -> Iterator[JobRecord]:
    """The prefix is `job`'s alone within the block, whose record is given; if `finished` is set there, all is done.
    When the block fails before any task is finished, nothing is left of a claim that began here.

    overwrite: remove what any job has written under the prefix. Without it, raises DataError where another job has
    finished shards there, where there are shards that no job has written, and while another process is at work."""
    path = records.job_path(job.prefix)
    with _lock(path):
        found = records.read_record(path, JobRecord)
        if found is not None and found.fingerprint == job.fingerprint and not overwrite:
            if found.finished is not None:
                _check_shards(job)
            yield found
            return
        if not overwrite:
            _check_free(job, found)
        remove_outputs(job.prefix)
        record = JobRecord(fingerprint=job.fingerprint, options=job.options())
        records.write_record(path, record)
        with _lock(path):
            try:
                yield record
            except BaseException:
                if not _has_finished(job.prefix, record):
                    remove_outputs(job.prefix)
                raise


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock on `path`, if it is there: it ends with this process, however that ends."""
    try:
        stream = path.open("rb+")
    except FileNotFoundError:
        yield
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{path}: another process is making this corpus; wait for it or choose another output prefix"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def remove_outputs(prefix: str) -> None:
    """Everything that this package writes under `prefix`; the claim last."""
    for path in outputs(prefix):
        path.unlink()
    records.manifest_path(prefix).unlink(missing_ok=True)
    job = records.job_path(prefix)
    job.with_name(job.name + ".tmp").unlink(missing_ok=True)
    job.unlink(missing_ok=True)


def outputs(prefix: str) -> list[Path]:
    """Shards, records and what killed writers left of them, by name."""
    directory, name = Path(prefix).parent, Path(prefix).name
    if not directory.is_dir():
        return []
    return sorted(
        path
        for path in directory.iterdir()
        if path.name.startswith(name) and _NAMES.fullmatch(path.name.removeprefix(name))
    )


def _has_finished(prefix: str, found: JobRecord) -> bool:
    return found.finished is not None or any(path.name.endswith(".done.json") for path in outputs(prefix))


def _differences(found: JobRecord, job: Job) -> str:
    options = job.options()
    names = sorted(name for name in options if found.options.get(name) != options[name])
    if not names:
        return "its inputs were others, or have changed since"
    return ", ".join(f"{name} was {found.options.get(name)!r:.60}, now {options[name]!r:.60}" for name in names)


def _check_free(job: Job, found: JobRecord | None) -> None:
    path = records.job_path(job.prefix)
    if found is not None and _has_finished(job.prefix, found):
        raise DataError(
            f"{path}: another job has written shards here ({_differences(found, job)}): choose another output "
            "prefix, or remove them with --overwrite"
        )
    if found is None and (others := outputs(job.prefix)):
        raise DataError(
            f"{others[0]}: there already, and no {path.name} says whose it is: choose another output prefix, or "
            "remove it with --overwrite"
        )


def _check_shards(job: Job) -> None:
    path = records.manifest_path(job.prefix)
    for shard in read_manifest(path).shards:
        for end in (".bin", ".idx"):
            if not (path.parent / f"{shard.path}{end}").is_file():
                raise DataError(
                    f"{path.parent / shard.path}{end}: is missing, though the job has finished: bring the file back, "
                    "or write all shards again with --overwrite"
                )

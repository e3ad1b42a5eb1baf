"""Whose an output prefix is. PREFIX.lock and the note beside it keep jobs from each other while they work,
PREFIX.job.json is the claim of the one that has begun there, and no shard is published without a look at it.

Where a file system has no locks, several processes may hold the claim of one and the same job: they write the same
bytes. Nobody removes anything there without --overwrite."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing import records
from illada_megatron.data.preprocessing.outputs import Outputs
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.preprocessing.records import JobRecord
from illada_megatron.data.shards.manifest import read_manifest
from illada_megatron.data.shards.prefix_lock import PrefixLock, locked_prefix


@contextmanager
def claimed_prefix(job: Job, tasks: Sequence[ShardTask], overwrite: bool) -> Iterator[JobRecord]:
    """The prefix is `job`'s alone within the block, whose record is given; if `finished` is set there, all is done.
    When the block fails before any shard is published, the claim is given up.

    overwrite: remove what has been written under the prefix. Without it no shard is ever removed, and DataError is
    raised where another job has written some, and where there are some that no job has written. With or without, it is
    raised while another process is at work, and where a file of another corpus has a name that this job would give."""
    with locked_prefix(job.prefix) as lock:
        found = _checked(job, tasks, overwrite, lock.works)
        if found is not None and found.finished is not None and not overwrite and not _is_left_over(job, lock):
            yield found  # there is nothing to change
            return
        with lock.noted():
            if lock.works:
                found = _checked(job, tasks, overwrite, lock.works)  # what another machine had may have gone on
            if found is None or found.fingerprint != job.fingerprint or overwrite:
                found = _claimed(job, tasks, found, overwrite)
            if lock.works:
                remove_temporaries(job.prefix)
            try:
                yield found
            except BaseException:
                if lock.is_ours():  # else what lies there is of another process, which works
                    _give_up(job)
                raise


def _checked(job: Job, tasks: Sequence[ShardTask], overwrite: bool, locked: bool) -> JobRecord | None:
    """The record that is there: without overwrite it is this job's, or of one that ended before its first shard.
    Raises DataError where the job may not go on; nothing is changed."""
    outputs = Outputs(job.prefix)
    if (problem := outputs.in_the_way(_numbered(tasks))) is not None:
        raise DataError(f"{problem}: choose another output prefix, or move it away")
    # read after what is there was listed: a claim is older than its shards
    found = records.read_record(records.job_path(job.prefix), JobRecord)
    if overwrite:
        return found
    if found is None or found.fingerprint != job.fingerprint:
        _check_free(job, found, outputs, locked)
    elif found.finished is not None:
        _check_shards(job)
    return found


def _claimed(job: Job, tasks: Sequence[ShardTask], found: JobRecord | None, overwrite: bool) -> JobRecord:
    if overwrite:
        remove_outputs(job.prefix)
    elif found is not None:
        records.job_path(job.prefix).unlink(missing_ok=True)
    record = JobRecord(fingerprint=job.fingerprint, options=job.options(), numbered_tasks=_numbered(tasks))
    records.write_record(records.job_path(job.prefix), record, replace=False)
    return record


def _is_left_over(job: Job, lock: PrefixLock) -> bool:
    """Whether there is something beside what a finished job has made."""
    return lock.is_noted or any(output.is_temporary or output.is_record for output in Outputs(job.prefix).own)


def _numbered(tasks: Sequence[ShardTask]) -> int:
    """Those whose shards have a number in their name."""
    return sum(bool(task.name) for task in tasks)


def remove_temporaries(prefix: str) -> None:
    """What killed writers have left. The prefix is this process's: who is still at work works for a job that has
    ended."""
    for output in Outputs(prefix).own:
        if output.is_temporary:
            output.path.unlink(missing_ok=True)


def remove_outputs(prefix: str) -> None:
    """Everything that has been written under `prefix`: first what makes it a corpus to readers, last the claim."""
    claim, manifest = records.job_path(prefix), records.manifest_path(prefix)
    files = [output.path for output in Outputs(prefix).own if output.path not in (claim, manifest)]
    for path in (manifest, *files, claim):
        path.unlink(missing_ok=True)


def remove_records(prefix: str) -> None:
    """Of single tasks: the job's own says that all are done."""
    for output in Outputs(prefix).own:
        if output.is_record:
            output.path.unlink(missing_ok=True)


def _give_up(job: Job) -> None:
    """The claim is looked at again: it may be another's by now. Shards that are there stay, with it."""
    remove_temporaries(job.prefix)
    claim = records.job_path(job.prefix)
    found = records.read_record(claim, JobRecord)
    if found is None or found.fingerprint != job.fingerprint or found.finished is not None:
        return
    if all(output.path == claim for output in Outputs(job.prefix).own):
        claim.unlink(missing_ok=True)


def _differences(found: JobRecord, job: Job) -> str:
    options, before = job.options(), {"prepend_bos": False, **found.options}  # which older records lack
    names = sorted(name for name in options if before.get(name) != options[name])
    if not names:
        return "its inputs were others, or have changed since"
    return ", ".join(f"{name} was {before.get(name)!r:.60}, now {options[name]!r:.60}" for name in names)


def _check_free(job: Job, found: JobRecord | None, outputs: Outputs, locked: bool) -> None:
    path = records.job_path(job.prefix)
    others = [output.path for output in outputs.own if output.path != path and not output.is_temporary]
    if found is not None and (found.finished is not None or others):
        raise DataError(
            f"{path}: another job has written shards here ({_differences(found, job)}): choose another output "
            "prefix, or remove them with --overwrite"
        )
    if found is not None and not locked:
        raise DataError(
            f"{path}: another job has begun here ({_differences(found, job)}), and this file system has no locks that "
            "would tell whether it is at work: choose another output prefix, or end that job and use --overwrite"
        )
    if others:
        raise DataError(
            f"{others[0]}: there already, and no {path.name} says whose it is: choose another output prefix, or "
            "remove it with --overwrite"
        )


def _check_shards(job: Job) -> None:
    path = records.manifest_path(job.prefix)
    for shard in read_manifest(path).shards:
        if (problem := records.shard_problem(path.parent, shard)) is not None:
            raise DataError(
                f"{problem}, though the job has finished: bring the file back, or write all shards again with "
                "--overwrite"
            )

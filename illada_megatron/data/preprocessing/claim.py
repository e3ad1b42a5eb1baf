"""Whose an output prefix is. PREFIX.lock keeps jobs from each other while they work, PREFIX.job.json is the claim of
the one that has begun there, and no shard is published without a look at it.

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
from illada_megatron.data.shards.prefix_lock import locked_prefix


@contextmanager
def claimed_prefix(job: Job, tasks: Sequence[ShardTask], overwrite: bool) -> Iterator[JobRecord]:
    """The prefix is `job`'s alone within the block, whose record is given; if `finished` is set there, all is done.
    When the block fails before any shard is published, the claim is given up.

    overwrite: remove what has been written under the prefix. Without it no shard is ever removed, and DataError is
    raised where another job has written some, and where there are some that no job has written. With or without, it is
    raised while another process is at work, and where a file of another corpus has a name that this job would give."""
    numbered_tasks = sum(bool(task.name) for task in tasks)
    with locked_prefix(job.prefix) as locked:
        outputs = Outputs(job.prefix)
        if (problem := outputs.in_the_way(numbered_tasks)) is not None:
            raise DataError(f"{problem}: choose another output prefix, or move it away")
        # read after what is there was listed: a claim is older than its shards
        found = records.read_record(records.job_path(job.prefix), JobRecord)
        if found is not None and found.fingerprint == job.fingerprint and not overwrite:
            if found.finished is not None:
                _check_shards(job)
            record = found
        else:
            if overwrite:
                remove_outputs(job.prefix)
            else:
                _check_free(job, found, outputs, locked)
                if found is not None:  # of a job that ended before its first shard
                    records.job_path(job.prefix).unlink(missing_ok=True)
            record = JobRecord(fingerprint=job.fingerprint, options=job.options(), numbered_tasks=numbered_tasks)
            records.write_record(records.job_path(job.prefix), record, replace=False)
        if locked:
            remove_temporaries(job.prefix)
        try:
            yield record
        except BaseException:
            if locked:
                _give_up(job)
            raise


def remove_temporaries(prefix: str) -> None:
    """What killed writers have left. The lock is held: who is still at work works for a job that has ended."""
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
    options = job.options()
    names = sorted(name for name in options if found.options.get(name) != options[name])
    if not names:
        return "its inputs were others, or have changed since"
    return ", ".join(f"{name} was {found.options.get(name)!r:.60}, now {options[name]!r:.60}" for name in names)


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

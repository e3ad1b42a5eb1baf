"""One save, as the threads of all ranks do it together; `saver.py` is the run's side of it."""

import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from illada_megatron.checkpoint import store
from illada_megatron.checkpoint.exchange import Exchange
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.integrity import FileRecord
from illada_megatron.checkpoint.files.patience import patiently
from illada_megatron.checkpoint.files.storage import Folder
from illada_megatron.checkpoint.files.tensors import TensorWriter, WrittenPart, write_metadata
from illada_megatron.checkpoint.lazy_snapshot import Handover
from illada_megatron.checkpoint.owner import Ownership, TakenOverError
from illada_megatron.checkpoint.retention import prune
from illada_megatron.checkpoint.sharded import Part
from illada_megatron.config import RunConfig


@dataclass(frozen=True)
class Attempt:
    """What all saves of this process have in common."""

    config: RunConfig
    fingerprints: Mapping[str, Any]
    ownership: Ownership
    exchange: Exchange


@dataclass(frozen=True)
class Job:
    """A save that is to be done."""

    number: int
    """Of the process's saves; the same on every rank."""
    path: Folder
    step: int
    parts: Iterable[Part]
    stream: torch.cuda.Stream | None
    """On a GPU: for the thread's copies, beside the run's work and behind what it had queued when it saved."""
    progress: dict[str, Any]
    saved: Sequence[int]
    """Steps that are saved when this one is, as `retention.prune` has them."""
    base: int | None
    """As `retention.prune` has it, as the next."""
    there: Collection[int]
    begun: Collection[int]
    begin: float
    """time.monotonic."""
    limit_seconds: float

    @property
    def deadline(self) -> float:
        """When all have to have written."""
        return self.begin + self.limit_seconds


@dataclass(frozen=True)
class Word:
    """What rank 0 says of a save in the end, as JSON holds it."""

    error: str | None = None
    """Why there is no checkpoint; None: there is."""
    nbytes: int = 0
    warnings: list[str] = field(default_factory=list)
    """Known to rank 0 alone."""
    record_left: bool = False
    """Though there is an error, its record may be there, and even durable: nobody may write there again."""
    taken_over: str | None = None
    """By "run", another attempt of this run, or "other"."""


class Writing:
    """A save that is being done by a thread."""

    def __init__(self, job: Job, attempt: Attempt) -> None:
        self.job = job
        self.word: Word | None = None
        """None: it has not ended, or the store is lost through which it would be heard. On rank 0 it is there before
        the thread ends, which then deletes what is not kept: that has a time limit of its own."""
        self.deadline = job.deadline
        self.problem: str | None = None
        """What happened to the store."""
        self.doing: str | None = None
        """What this rank itself has to do and has not done; None: it waits for others, or has ended."""
        self.seconds = 0.0
        self._attempt, self._exchange = attempt, attempt.exchange
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{job.step}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def overdue(self) -> bool:
        """Its time limit has passed, and it has not ended."""
        return not self.ended and time.monotonic() > self.deadline

    def join(self, seconds: float) -> None:
        """Wait until it has ended, at most so long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._write_together()
        except Exception as failure:  # of the store; a thread has nobody to raise to, the run says it in `Saver.wait`
            self.problem = error_text(failure)
        finally:
            if isinstance(self.job.parts, Handover):
                self.job.parts.close()
            self.doing = None
            self.seconds = time.monotonic() - self.job.begin

    def _write_together(self) -> None:
        first, exchange = self._exchange.rank == 0, self._exchange
        topic = str(self.job.number)
        refused = exchange.told(f"{topic}/begun", asdict(self._begun()) if first else None)
        if refused["error"] is not None:
            self.word = Word(**refused)
            return
        own = self._own_part()
        if not first:
            exchange.give(f"{topic}/part", own)
            self.word = Word(**exchange.told(f"{topic}/word", None))
            return
        parts, missing = exchange.take(f"{topic}/part", own, self.job.deadline)
        word, leftover = self._completed(parts, missing)
        exchange.told(f"{topic}/word", asdict(word))
        self.word = word
        self.deadline = time.monotonic() + self.job.limit_seconds
        if not missing:  # all have gone on to wait for this word
            exchange.forget(f"{topic}/begun")
            exchange.forget(f"{self.job.number - 1}/word")
        if leftover:
            self._give_back()
        elif word.error is None:
            self.word = replace(word, warnings=self._tidied())

    def _begun(self) -> Word:
        """Make the folder, empty: what lies there was interrupted, damaged, or belongs to steps that are done again."""
        self.doing = f"making {self.job.path} empty"
        try:
            self._attempt.ownership.require()
            # the record first: a half-deleted folder is no checkpoint
            self.job.path.remove(store.RECORD)
            self.job.path.clear()
            self.job.path.make()
        except Exception as error:  # the other ranks wait for this one's word
            return _failed(error)
        finally:
            self.doing = None
        return Word()

    def _own_part(self) -> dict[str, Any]:
        """Write what this rank has to: a `WrittenPart`'s plain form, or an error."""
        rank, writer = self._exchange.rank, None
        self.doing = f"writing its part of {self.job.path}"
        try:
            if self.job.stream is not None:  # a new thread's device is the first: it would make a context there
                torch.cuda.set_device(self.job.stream.device)
            writer = TensorWriter(self.job.path, rank, attempt=self._attempt.ownership.owner.attempt)
            with torch.cuda.stream(self.job.stream):  # None: no GPU, and nothing happens
                for part in self.job.parts:
                    writer.write(part.name, part.tensor, part.offset, part.whole_shape)
            return writer.close().plain()
        except Exception as error:  # rank 0 waits for this one's word
            if writer is not None:
                writer.abandon()
            return {"error": f"rank {rank}: {error_text(error)}"}
        finally:
            self.doing = None

    def _completed(self, parts: Sequence[dict[str, Any]], missing: Sequence[int]) -> tuple[Word, bool]:
        """On rank 0, what the ranks have written made a checkpoint; and whether it was not, so that the folder may go:
        nothing in it counts, and nobody writes there any more."""
        if missing:
            return Word(f"{_listed('rank', missing)}: {self._too_late()}"), False
        if errors := [part["error"] for part in parts if "error" in part]:
            return Word("; ".join(errors[:3]) + (f" and {len(errors) - 3} more" if len(errors) > 3 else "")), True
        self.doing = f"completing {self.job.path}"
        try:
            files = write_metadata(self.job.path, [WrittenPart.from_plain(part) for part in parts])
            if time.monotonic() > self.job.deadline:
                raise OSError(self._too_late())
            self._attempt.ownership.require()
        except Exception as error:  # the other ranks wait for this one's word
            return _failed(error), not isinstance(error, TakenOverError)
        try:
            self._record(files)
        except Exception as error:
            left = self._may_have_left_record()
            return replace(_failed(error), record_left=left), not left
        return Word(nbytes=sum(record["bytes"] for record in files.values())), False

    def _too_late(self) -> str:
        minutes = self._attempt.config.checkpoint.save_timeout_minutes
        return (
            f"has not written within {minutes:g} minutes (checkpoint.save_timeout_minutes): does the storage answer? "
            "Where it is only slow, raise the limit"
        )

    def _record(self, files: Mapping[str, FileRecord]) -> None:
        job, attempt = self.job, self._attempt
        config = attempt.config.model_dump(mode="json")
        patiently(lambda: store.finish(job.path, job.step, config, job.progress, files, attempt.fingerprints))

    def _may_have_left_record(self) -> bool:
        """A flush may fail behind a record that is there."""
        try:
            return self.job.path.size(store.RECORD) is not None
        except OSError:
            return True

    def _tidied(self) -> list[str]:
        """The checkpoint is complete. What fails from now on is said, and takes nothing back."""
        job, settings = self.job, self._attempt.config.checkpoint
        self.doing = f"deleting what is not kept in {job.path.parent}"
        warnings = []
        try:
            self._attempt.ownership.require()
            store.move_pointer(job.path)
        except Exception as error:
            warnings.append(f"`latest` could not be moved to {job.path.name}: {error_text(error)}")
        # in a row of bad steps these weights may be the bad ones, and an older checkpoint the one to return to
        keep_last = None if store.in_bad_steps(job.progress) else settings.keep_last
        try:
            self._attempt.ownership.require()
            return warnings + prune(
                job.path.parent, job.saved, job.base, job.there, job.begun, keep_last, settings.keep_every
            )
        except Exception as error:
            return [*warnings, f"older checkpoints stay: {error_text(error)}"]

    def _give_back(self) -> None:
        """The disk's space; what cannot go now was interrupted, and goes with those that are not kept."""
        with suppress(OSError, CheckpointError):
            self._attempt.ownership.require()
            self.job.path.clear()


def _failed(error: Exception) -> Word:
    taken_over = ("run" if error.same_run else "other") if isinstance(error, TakenOverError) else None
    return Word(f"rank 0: {error_text(error)}" if taken_over is None else str(error), taken_over=taken_over)


def _listed(what: str, numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"{what} {', '.join(map(str, numbers[:8]))}{more}"


def error_text(error: Exception) -> str:
    """For the user: an error that says what is wrong in its own words; of others, their kind too."""
    return str(error) if isinstance(error, OSError | CheckpointError) else repr(error)

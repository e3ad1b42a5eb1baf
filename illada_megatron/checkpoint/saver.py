"""Saving while the run goes on: a thread writes the state from where it lives until the optimizer is to change it.

    save()   hands this rank's part of the state to its thread, and returns
    thread   writes, makes durable, and tells the other ranks' threads through a process group of their own; when all
             have written, rank 0 makes it a checkpoint (`store.finish`) and deletes what is not kept any more
    optimizer.step()   first waits until what is not written yet is copied (`lazy_snapshot.py`): the whole stall
    news()   between steps: what has become of it

A save that fails on any rank (disk full, permission lost) is given up by all; the last good checkpoint stays, the run
goes on, and the next save tries again.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

from illada_megatron.checkpoint import store
from illada_megatron.checkpoint.files.agreement import collected, rank_and_size, told
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.storage import Folder, folder
from illada_megatron.checkpoint.files.tensors import TensorWriter, WrittenPart, write_metadata
from illada_megatron.checkpoint.lazy_snapshot import Handover
from illada_megatron.checkpoint.retention import prune
from illada_megatron.checkpoint.sharded import Part, parts_to_save, saved_progress
from illada_megatron.checkpoint.state import optimizers
from illada_megatron.config import RunConfig

# A slow disk is no reason to end a run: ranks that died are noticed by the run's own collectives.
_GROUP_TIMEOUT = timedelta(days=1)
# How long an error that ends the run waits for a checkpoint that is almost there.
_LAST_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class SaveOutcome:
    """What became of a save, the same on every rank."""

    step: int
    path: str
    stall_seconds: float
    """The run waited so long: in `save` and before the optimizer's next step."""
    seconds: float
    """From the call to the durable checkpoint."""
    nbytes: int
    error: str | None
    """Why there is no checkpoint; None: there is."""
    warnings: tuple[str, ...] = ()
    """Older checkpoints that could not be deleted."""


@dataclass(frozen=True)
class _Job:
    path: Folder
    step: int
    parts: Iterable[Part]
    stream: torch.cuda.Stream | None
    """On a GPU: for the thread's copies, beside the run's work and behind what it had queued when it saved."""
    progress: dict[str, Any]
    begin: float


class Saver:
    """Writes the checkpoints of a run, one at a time. Every rank has one, and calls it in the same order."""

    def __init__(self, config: RunConfig, fingerprints: Mapping[str, Any], last_saved: int | None) -> None:
        """last_saved: the step of the checkpoint of checkpoint.save_dir that the run continues from; None: none."""
        self.place = folder(config.checkpoint.save_dir) if config.checkpoint.save_dir else None
        """None: the configuration saves nothing."""
        self.last_saved = last_saved
        """Step of the newest good checkpoint in `place`."""
        self._config, self._fingerprints = config, dict(fingerprints)
        several = self.place is not None and rank_and_size()[1] > 1
        self._group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT) if several else None
        self._thread: threading.Thread | None = None
        self._outcome: SaveOutcome | None = None
        self._stall = 0.0
        self._handover: Handover | None = None
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join(_LAST_WAIT_SECONDS if error is not None else None)
        for hook in self._hooks:
            hook.remove()

    def save(
        self, step: int, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, progress: Mapping[str, Any]
    ) -> list[SaveOutcome]:
        """Save the state as it is now as the checkpoint of `step`; nothing where the configuration saves nothing.
        Returns at once with checkpoint.asynchronous, else when it is durable; with the outcomes known by then.

        progress: plain values, the same on every rank. What goes wrong with the files is in the outcome. Nothing but
        this optimizer's step may change the state while it is written (`wait` first where something else does).
        """
        if self.place is None:
            return []
        begin = time.perf_counter()
        earlier = self.wait()
        parts = list(parts_to_save(chunks, optimizer, self._config.model))
        path = store.step_directory(self.place, step)
        job = _Job(path, step, parts, _side_stream(parts), saved_progress(dict(progress), optimizer), begin)
        self._outcome = None
        if not self._config.checkpoint.asynchronous:
            self._run(job)
            return [*earlier, *self.news()]
        if not self._hooks:
            inner = [one.optimizer for one in optimizers(optimizer) if one.optimizer is not None]
            self._hooks = [one.register_step_pre_hook(self._before_step) for one in inner]
        self._handover = Handover(parts)
        job = replace(job, parts=self._handover)
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        self._stall = time.perf_counter() - begin
        return earlier

    def news(self) -> list[SaveOutcome]:
        """What has ended since the last call, on this rank; does not wait."""
        if self._outcome is None or (self._thread is not None and self._thread.is_alive()):
            return []
        outcome, self._outcome, self._thread = self._outcome, None, None
        if outcome.error is None:
            self.last_saved = outcome.step
        stall = self._stall if self._config.checkpoint.asynchronous else outcome.seconds
        return [replace(outcome, stall_seconds=stall)]

    def wait(self) -> list[SaveOutcome]:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
        return self.news()

    def _before_step(self, *_: Any) -> None:
        """The optimizer is about to change what is being written."""
        if self._handover is not None:
            begin = time.perf_counter()
            self._handover.secure(self._copy)
            self._handover = None
            self._stall += time.perf_counter() - begin

    def _copy(self, part: Part) -> Tensor:
        """Into memory that is kept from save to save: new pages would cost more than the copy."""
        key = (part.name, part.offset)
        kept = self._copies.get(key)
        if kept is None or kept.shape != part.tensor.shape or kept.dtype != part.tensor.dtype:
            pinned = part.tensor.is_cuda
            kept = self._copies[key] = torch.empty(part.tensor.shape, dtype=part.tensor.dtype, pin_memory=pinned)
        return kept.copy_(part.tensor)

    def _run(self, job: _Job) -> None:
        error: str | None
        nbytes = 0
        warnings: tuple[str, ...] = ()
        try:
            nbytes, warnings, error = self._write_together(job)
        except Exception as failure:  # of the group; a thread has nobody to raise to, the run says it between steps
            error = _text(failure)
        seconds = time.perf_counter() - job.begin
        self._outcome = SaveOutcome(job.step, str(job.path), 0.0, seconds, nbytes, error, warnings)

    def _write_together(self, job: _Job) -> tuple[int, tuple[str, ...], str | None]:
        """(bytes, warnings, error) of a save, the same on every rank."""
        rank, _ = rank_and_size()
        if (problem := told(_problem(self._prepare, job) if rank == 0 else None, self._group)) is not None:
            return 0, (), problem
        written = collected(self._write_own(job, rank), self._group)
        nbytes = 0
        warnings: tuple[str, ...] = ()
        if rank == 0:
            errors = [f"rank {number}: {part}" for number, part in enumerate(written) if isinstance(part, str)]
            parts = [part for part in written if isinstance(part, WrittenPart)]
            if not errors:
                try:
                    nbytes, warnings = self._finish(job, parts)
                except Exception as error:  # the other ranks wait for this one's word
                    errors = [f"rank 0: {_text(error)}"]
            if errors:
                problem = "; ".join(errors[:3]) + (f" and {len(errors) - 3} more" if len(errors) > 3 else "")
                _problem(_clear, job)  # gives the disk's space back
        return told((nbytes, warnings, problem), self._group)

    def _prepare(self, job: _Job) -> None:
        """An empty folder: what lies there was interrupted, damaged, or belongs to steps that are being done again."""
        _clear(job)
        job.path.make()

    def _write_own(self, job: _Job, rank: int) -> WrittenPart | str:
        writer = None
        try:
            writer = TensorWriter(job.path, rank)
            with torch.cuda.stream(job.stream):  # None: no GPU, and nothing happens
                for part in job.parts:
                    writer.write(part.name, part.tensor, part.offset, part.whole_shape)
            return writer.close()
        except Exception as error:  # rank 0 waits for this one's word
            if writer is not None:
                writer.abandon()
            return _text(error)

    def _finish(self, job: _Job, parts: Sequence[WrittenPart]) -> tuple[int, tuple[str, ...]]:
        files = write_metadata(job.path, parts)
        config = self._config.model_dump(mode="json")
        store.finish(job.path, job.step, config, job.progress, files, self._fingerprints)
        store.move_pointer(job.path)
        settings = self._config.checkpoint
        warnings = prune(job.path.parent, settings.keep_last, settings.keep_every)
        return sum(record["bytes"] for record in files.values()), tuple(warnings)


def _side_stream(parts: Sequence[Part]) -> torch.cuda.Stream | None:
    device = next((part.tensor.device for part in parts if part.tensor.is_cuda), None)
    if device is None:
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _clear(job: _Job) -> None:
    # the record first: a half-deleted folder is no checkpoint
    job.path.remove(store.RECORD)
    job.path.clear()


def _problem(action: Any, job: _Job) -> str | None:
    try:
        action(job)
    except Exception as error:  # the other ranks wait for this one's word
        return f"rank 0: {_text(error)}"
    return None


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, OSError | CheckpointError) else repr(error)

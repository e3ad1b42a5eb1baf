"""Saving while the run goes on: a thread writes the state from where it lives until the optimizer is to change it.

    save()   hands this rank's part of the state to its thread, and returns
    thread   writes, makes durable, and tells the other ranks' threads (`exchange.py`); when all have written, rank 0
             makes it a checkpoint (`store.finish`) and deletes what is not kept any more: `writing.py`
    optimizer.step()   first waits until what is not written yet is copied (`lazy_snapshot.py`): the whole stall
    news()   between steps: what has become of it
    wait()   all ranks together: until nothing is written any more

A save that fails on any rank (disk full, permission lost) is given up by all; the last good checkpoint stays, the run
goes on, and the next save tries again. One that does not end, where storage does not answer, holds the run up for a
minute at most; where it has not ended at the next save and beyond its time limit, that ends the run, on all ranks.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

from illada_megatron.checkpoint import store
from illada_megatron.checkpoint.exchange import Exchange
from illada_megatron.checkpoint.files.agreement import largest, of_first, rank_and_size
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.lazy_snapshot import Handover
from illada_megatron.checkpoint.owner import Ownership
from illada_megatron.checkpoint.sharded import Part, parts_to_save, saved_progress
from illada_megatron.checkpoint.state import optimizers
from illada_megatron.checkpoint.writing import Attempt, Job, Writing
from illada_megatron.config import RunConfig

# How long the optimizer's step waits for a single write, and of the time in which the others wait for this rank.
_PATIENCE_SECONDS, _PATIENCE_SHARE = 60.0, 0.5
# Beyond the time limit: what rank 0 finds out at the limit takes a moment to be heard.
_GRACE_SECONDS = 10.0
# Between two looks of all ranks whether all have ended.
_SHORTEST_SLICE_SECONDS, _LONGEST_SLICE_SECONDS = 0.02, 1.0
# How long an error that ends the run waits for a checkpoint that is almost there. Where a rank is lost it cannot come,
# unless that one had written its part.
_LAST_WAIT_SECONDS, _LOST_WAIT_SECONDS = 60.0, 2.0


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
    """What could not be done after it was complete: older checkpoints deleted, `latest` moved."""
    failures: int = 0
    """Saves that have failed one after the other, with this one."""


class Saver:
    """Writes the checkpoints of a run, one at a time. Every rank has one, and calls it in the same order."""

    def __init__(
        self, config: RunConfig, fingerprints: Mapping[str, Any], last_saved: int | None, ownership: Ownership | None
    ) -> None:
        """last_saved: the step of the checkpoint of checkpoint.save_dir that the run continues from; None: none.
        ownership: of save_dir. Raises OSError where that cannot be written to, and none of this run's checkpoints is
        there: a disk that is full for a while is no reason not to go on."""
        self.place = ownership.place if ownership is not None else None
        """None: the configuration saves nothing."""
        self.last_saved = last_saved
        """Step of the newest good checkpoint in `place`."""
        self.last_error: str | None = None
        """Of the last save that has failed."""
        self.end: OSError | CheckpointError | None = None
        """Why the run cannot go on: another has taken save_dir over, or too many saves in a row have failed. A rank may
        know it before others; after `wait` all do."""
        self.taken_over = False
        """By another: this attempt writes nothing there any more."""
        self.warning: str | None = None
        """On rank 0: what the user should hear at the start."""
        self.record_left: int | None = None
        """Step of a save that has failed, but whose record may be there: it is not written again."""
        self._config = config
        self._base, self._saved = last_saved, list[int]()
        self._attempt: Attempt | None = None
        self._there, self._begun = frozenset[int](), set[int]()
        if ownership is not None:
            of_first(lambda: self._look_around(ownership))
            self._attempt = Attempt(config, dict(fingerprints), ownership, Exchange(ownership.owner.attempt))
        self._writing: Writing | None = None
        self._count = self._failures = 0
        self._stall = 0.0
        self._said_overdue = False
        self._handover: Handover | None = None
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._hooks: list[Any] = []

    def _look_around(self, ownership: Ownership) -> None:
        try:
            # first: where the disk is full, what was there has to go for the next save
            paths = store.checkpoints_newest_first(ownership.place)
            self._there = frozenset(store.step_of(path.name) for path in paths)
            ownership.require()
        except OSError as error:
            if self.last_saved is None:
                raise
            self.warning = f"{self.place} cannot be written to: {error}: it is tried again with the next save"

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None and not self._writing.overdue:
            lost = isinstance(error, RuntimeError) and not isinstance(error, CheckpointError)  # by a collective
            patience = _LOST_WAIT_SECONDS if lost else _LAST_WAIT_SECONDS
            self._writing.join(patience if error is not None else self._writing.deadline - time.monotonic())
        for hook in self._hooks:
            hook.remove()
        if self._attempt is not None:
            self._attempt.exchange.close()
        if self._writing is not None:
            self._writing.join(_LONGEST_SLICE_SECONDS)

    def save(
        self, step: int, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, progress: Mapping[str, Any]
    ) -> list[SaveOutcome]:
        """Save the state as it is now as the checkpoint of `step`; nothing where the configuration saves nothing.
        Returns at once with checkpoint.asynchronous, else when it is durable; with the outcomes known by then.

        progress: plain values, the same on every rank. What goes wrong with the files is in the outcome. Nothing but
        this optimizer's step may change the state while it is written (`secure` first where something else does).
        Raises as `wait`.
        """
        if self._attempt is None or self.place is None:
            return []
        called = time.monotonic()
        earlier = self.wait()
        begin = time.monotonic()
        parts = list(parts_to_save(chunks, optimizer, self._config.model))
        asynchronous = self._config.checkpoint.asynchronous
        if asynchronous:
            if not self._hooks:
                inner = [one.optimizer for one in optimizers(optimizer) if one.optimizer is not None]
                self._hooks = [one.register_step_pre_hook(self.secure) for one in inner]
            self._handover = Handover(parts)
        self._count += 1
        self._begun.add(step)
        job = Job(
            number=self._count,
            path=store.step_directory(self.place, step),
            step=step,
            parts=self._handover if self._handover is not None else parts,
            stream=_side_stream(parts),
            progress=saved_progress(dict(progress), optimizer),
            saved=(*self._saved, step),
            base=self._base,
            there=self._there,
            begun=frozenset(self._begun),
            begin=begin,
            limit_seconds=60 * self._config.checkpoint.save_timeout_minutes,
        )
        self._said_overdue = False
        self._writing = Writing(job, self._attempt)
        self._stall = time.monotonic() - called
        return earlier if asynchronous else [*earlier, *self.wait()]

    def went_back(self, step: int, in_place: bool) -> None:
        """The run has gone back to the checkpoint of `step`; in_place: one of `place`. Those after it are not of its
        past any more, and go with the next save."""
        self.last_saved = step if in_place else None
        self._saved = [saved for saved in self._saved if saved <= step]
        self._base = None if self._base is None else min(self._base, step)

    def news(self) -> list[SaveOutcome]:
        """What has ended since the last call, on this rank, or should have; does not wait."""
        writing = self._writing
        if writing is None:
            return []
        if not writing.ended or writing.word is None:
            return self._overdue(writing)
        self._writing, word = None, writing.word
        if word.error is None:
            self.last_saved, self._failures = writing.job.step, 0
            self._saved.append(writing.job.step)
        else:
            self.last_error = word.error
            self.record_left = writing.job.step if word.record_left else None
            self._failures += 1
            self._consider_the_end(word.error, word.taken_over)
            if self._said_overdue:
                return []
        stall = self._stall if self._config.checkpoint.asynchronous else writing.seconds
        return [self._outcome(writing, stall, word.error, self._failures, word.nbytes, word.warnings)]

    def _overdue(self, writing: Writing) -> list[SaveOutcome]:
        """Once."""
        if self._said_overdue or not _is_stuck(writing):
            return []
        self._said_overdue = True
        return [self._outcome(writing, self._stall, _stuck_text(writing), self._failures + 1)]

    def _outcome(
        self,
        writing: Writing,
        stall: float,
        error: str | None,
        failures: int,
        nbytes: int = 0,
        warnings: Sequence[str] = (),
    ) -> SaveOutcome:
        job, seconds = writing.job, writing.seconds or time.monotonic() - writing.job.begin
        return SaveOutcome(job.step, str(job.path), stall, seconds, nbytes, error, tuple(warnings), failures)

    def _consider_the_end(self, error: str, taken_over: str | None) -> None:
        most = self._config.checkpoint.max_failed_saves
        if taken_over is not None:
            # of this run, the launcher may start it again: it joins the newer attempt. Another's would only come again.
            self.end = OSError(error) if taken_over == "run" else CheckpointError(error)
            self.taken_over = True
        elif most is not None and self._failures >= most:
            self.end = OSError(
                f"{self._failures} saves in a row have failed (checkpoint.max_failed_saves), the last with: {error}; "
                f"{self.last_good()}: mend the cause and start the run again, it goes on from there"
            )

    def wait(self) -> list[SaveOutcome]:
        """Until nothing is being written, on any rank: all call it, and look together again and again.

        Raises OSError, on all ranks, where a save has not ended within its time limit on some rank, or the ranks'
        store is lost. A rank that does not answer is noticed after runtime.distributed_timeout_minutes.
        """
        if self._attempt is None:
            return []
        rank, seconds = self._attempt.exchange.rank, _SHORTEST_SLICE_SECONDS
        while True:
            writing = self._writing
            unended = writing is not None and not writing.ended
            stuck = writing is not None and _is_stuck(writing)
            at_fault = stuck and writing is not None and (writing.doing or writing.problem) is not None
            any_unended, any_stuck, culprit = largest([unended, stuck, rank + 1 if at_fault else 0])
            if any_stuck:
                if writing is not None and writing.word is not None and writing.word.error is None:
                    self.last_saved = writing.job.step
                mine = _stuck_text(writing) if stuck and writing is not None else f"rank {rank}: has ended"
                raise OSError(
                    f"a save does not end; {f'rank {culprit - 1} is stuck' if culprit else 'no rank says why'} ({mine})"
                    f"; {self.last_good()}: the run ends, to be started again from there"
                )
            if not any_unended:
                return self.news()
            if writing is not None:
                writing.join(seconds)
            seconds = min(2 * seconds, _LONGEST_SLICE_SECONDS)

    def last_good(self) -> str:
        """What a run that is started again has, as a part of a sentence."""
        if self.last_saved is None:
            return f"there is no checkpoint of this run in {self.place} yet"
        return f"the last good checkpoint in {self.place} is of step {self.last_saved}"

    def secure(self, *_: Any) -> None:
        """Return when what is being written may change: the optimizer is about to step, or something else is. This
        rank alone."""
        if self._handover is not None:
            begin = time.monotonic()
            answer_seconds = 60 * self._config.runtime.distributed_timeout_minutes
            self._handover.secure(self._copy, min(_PATIENCE_SECONDS, _PATIENCE_SHARE * answer_seconds))
            self._handover = None
            self._stall += time.monotonic() - begin

    def _copy(self, part: Part) -> Tensor:
        """Into memory that is kept from save to save: new pages would cost more than the copy."""
        key = (part.name, part.offset)
        kept = self._copies.get(key)
        if kept is None or kept.shape != part.tensor.shape or kept.dtype != part.tensor.dtype:
            pinned = part.tensor.is_cuda
            kept = self._copies[key] = torch.empty(part.tensor.shape, dtype=part.tensor.dtype, pin_memory=pinned)
        return kept.copy_(part.tensor)


def _side_stream(parts: Sequence[Part]) -> torch.cuda.Stream | None:
    device = next((part.tensor.device for part in parts if part.tensor.is_cuda), None)
    if device is None:
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _is_stuck(writing: Writing) -> bool:
    late = not writing.ended and time.monotonic() > writing.deadline + _GRACE_SECONDS
    return late or writing.problem is not None


def _stuck_text(writing: Writing) -> str:
    if writing.problem is not None:
        return f"rank {rank_and_size()[0]}: the ranks' store does not answer: {writing.problem}"
    seconds = time.monotonic() - writing.job.begin
    doing = writing.doing or "waiting for the other ranks"
    return f"rank {rank_and_size()[0]}: {doing} has not ended after {seconds:.0f} s (checkpoint.save_timeout_minutes)"

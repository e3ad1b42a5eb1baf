"""The thread that owns the engine: texts join and leave it between two steps, and what a step has done to each is told
to the event loop.

The loop calls `submit` and `cancel`; nobody but the thread touches the engine, the model or a text in work.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from illada_megatron.generation import Engine, Generator, Job, Result, Settings, Step
from illada_megatron.generation.constraining import Constraint
from illada_megatron.generation.ending import Decode, Search
from illada_megatron.generation.text import Text
from illada_megatron.serving.errors import Refused
from illada_megatron.serving.metrics import Metrics

_log = logging.getLogger("illada.serve")
SICK = 3
"""Steps one after another in which nothing worked, before the server calls itself so."""
_PROBE_SECONDS = 1.0
"""After which an idle server that failed tries whether it still does: nobody may send it anything until then."""


@dataclass(frozen=True)
class Progress:
    """What a step has done to a text."""

    step: Step
    length: int
    """Tokens of the text, those still masked among them."""
    settled: list[int]
    """Of what is generated (of an infilling: of the whole text) the tokens left of its first mask that were not so
    before."""


@dataclass(frozen=True)
class Failed:
    """A text that will not be finished."""

    error: Refused


Event = Progress | Result | Failed


class Inbox:
    """What has happened to the texts of one request, until it is read. It holds no more than their tokens: each is
    revealed once, however slowly it is read."""

    def __init__(self) -> None:
        self._events: list[tuple[Work, Event]] = []
        self._some = asyncio.Event()

    def put(self, work: "Work", event: Event) -> None:
        self._events.append((work, event))
        self._some.set()

    async def take(self) -> "list[tuple[Work, Event]]":
        """All there is, at least one."""
        await self._some.wait()
        self._some.clear()
        events, self._events = self._events, []
        return events


@dataclass(eq=False)
class Work:
    """A text of a request."""

    index: int
    """Among the request's texts."""
    text: Text
    decode: Decode
    inbox: Inbox
    constraint: Constraint | None = None
    search: Search | None = None
    """Of a stop pattern."""
    watched: bool = False
    """Its steps are told, and not its end alone."""
    job: Job | None = None
    settled: int = 0
    """Tokens that were told to be so."""
    over: bool = False
    """Nobody waits for it any more, or its end has been told."""


@dataclass
class _Share:
    """What both threads see, under its lock."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    queue: deque[Work] = field(default_factory=deque)
    running: list[Work] = field(default_factory=list)
    closed: bool = False


class Worker:
    """Made, and called, on the event loop."""

    def __init__(self, generator: Generator, metrics: Metrics, most_running: int, most_queued: int) -> None:
        self._generator = generator
        self._engine = Engine(generator.model, generator.words, generator.pass_tokens)
        self._metrics = metrics
        self._most_running, self._most_queued = most_running, most_queued
        self._share = _Share()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="illada engine")
        self.refusing = False
        """The server ends: nothing more is accepted."""
        self.steps = 0
        self.failed_in_a_row = 0
        """Steps in which nothing worked: what fails beside others that work is its own request's fault."""
        metrics.watch(self.queued, self.running)
        self._thread.start()

    def queued(self) -> int:
        return len(self._share.queue)

    def running(self) -> int:
        return len(self._share.running)

    def submit(self, works: Sequence[Work]) -> None:
        """All of them or none. Raises Refused."""
        if self.refusing:
            raise Refused(503, "the server is ending: ask another, or this one when it is back", code="stopping")
        with self._share.changed:
            waiting = len(self._share.queue)
            if len(works) > self._most_queued:
                message = f"{len(works):,} texts are asked for at once, this server lets {self._most_queued:,} wait"
                raise Refused(400, message, "n")
            if waiting + len(works) > self._most_queued:
                message = f"{waiting:,} texts wait, and at most {self._most_queued:,} may: try again later"
                raise Refused(429, message, code="queue_full", retry_after=1 + waiting // self._most_running)
            self._share.queue.extend(works)
            self._share.changed.notify()

    def cancel(self, works: Sequence[Work]) -> None:
        """Their work ends with the step in hand; nothing more is told of them."""
        with self._share.changed:
            for work in works:
                work.over = True
            self._share.changed.notify()

    def fail_rest(self, error: Refused) -> None:
        """Tell all texts, waiting or in work, that they are not finished."""
        with self._share.changed:
            left = [work for work in (*self._share.queue, *self._share.running) if not work.over]
            self.cancel(left)
        for work in left:
            work.inbox.put(work, Failed(error))

    def close(self) -> None:
        """The thread ends with the step in hand."""
        with self._share.changed:
            self._share.closed = True
            self._share.changed.notify()
        self._thread.join()

    # from here on: the thread's

    def _run(self) -> None:
        try:
            while self._gather():
                if self._share.running:
                    self._step()
                elif self.failed_in_a_row:
                    self._probe()
        except BaseException:
            self.refusing, self.failed_in_a_row = True, SICK
            self._loop.call_soon_threadsafe(self.fail_rest, Refused(500, "the engine has ended: see the server's log"))
            raise
        finally:
            for job in list(self._engine.jobs):
                self._engine.remove(job)

    def _gather(self) -> bool:
        """Let texts leave and join; wait where there is none, but for long where the last failed. False: it is over."""
        share = self._share
        with share.changed:
            while True:
                for work in [work for work in share.running if work.over]:
                    self._leave(work)
                if any(work.over for work in share.queue):
                    share.queue = deque(work for work in share.queue if not work.over)
                if share.closed:
                    return False
                if share.queue or share.running:
                    break
                if not share.changed.wait(_PROBE_SECONDS if self.failed_in_a_row else None):
                    return True  # nothing has come
            joining = [
                share.queue.popleft() for _ in range(min(len(share.queue), self._most_running - len(share.running)))
            ]
            share.running += joining
        told = [(work, failed) for work in joining if (failed := self._join(work)) is not None]
        self._tell(told)
        return True

    def _join(self, work: Work) -> Failed | None:
        try:
            work.job = self._engine.add(work.text, work.decode, work.constraint, work.search)
        except ValueError as error:
            return Failed(Refused(400, str(error)))
        except Exception as error:  # of memory, for the keys and values to keep
            return self._failed(error)
        return None

    def _step(self) -> None:
        began = time.perf_counter()
        of_job = {work.job: work for work in self._share.running if work.job is not None}
        told: list[tuple[Work, Event]] = []
        try:
            for job, step in self._engine.steps():
                told += self._events(of_job[job], job, step)
        except Exception as error:  # whatever it is, the others' texts go on
            failed = self._failed(error)
            told += [(of_job[job], failed) for job in self._engine.in_hand or of_job]
            self._engine.in_hand = []
        if any(isinstance(event, Progress) for _, event in told):
            self.failed_in_a_row = 0
        self.steps += 1
        self._metrics.stepped(
            time.perf_counter() - began, sum(e.step.computed for _, e in told if isinstance(e, Progress))
        )
        self._tell(told)

    def _probe(self) -> None:
        """A text of one token that nobody asked for."""
        words = self._generator.words
        begin = torch.tensor([0 if words.mask else 1])
        job = self._engine.add(Text(begin, Settings(gen_length=1, block_length=1, steps=1), words.mask))
        try:
            self._engine.step()
            self.failed_in_a_row = 0
            _log.warning("a text of one token works again")
        except Exception as error:
            _log.debug("a text of one token fails too", exc_info=error)
        finally:
            self._engine.remove(job)
            self._engine.in_hand = []

    def _events(self, work: Work, job: Job, step: Step) -> list[tuple[Work, Event]]:
        events: list[tuple[Work, Event]] = [
            (work, Progress(step, job.text.tokens.numel(), self._settled(work, job.text)))
        ]
        if step.end is not None:
            events.append((work, self._generator.result(job, step)))
        return events

    def _settled(self, work: Work, text: Text) -> list[int]:
        if not work.watched:
            return []
        tokens = text.tokens if text.infill else text.generated
        masks = (tokens == text.mask_token_id).nonzero()
        end = int(masks[0]) if masks.numel() else tokens.numel()
        begin, work.settled = work.settled, max(work.settled, end)
        return tokens[begin:end].tolist()

    def _failed(self, error: Exception) -> Failed:
        self.failed_in_a_row += 1
        name = secrets.token_hex(4)
        _log.error("a step failed (%s)", name, exc_info=error)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return Failed(Refused(500, "the device is out of memory: ask for shorter texts, or fewer", code="memory"))
        # what went wrong inside is no stranger's to read
        message = f"the step failed: whoever runs this server finds why in its log, as {name}"
        return Failed(Refused(500, message, code="step_failed"))

    def _tell(self, told: Sequence[tuple[Work, Event]]) -> None:
        """In order, on the loop; those that end leave."""
        with self._share.changed:
            for work, event in told:
                if not isinstance(event, Progress):
                    self._leave(work)
        if told:
            self._loop.call_soon_threadsafe(_hand_over, told)

    def _leave(self, work: Work) -> None:
        if work.job is not None:
            self._engine.remove(work.job)
        if work in self._share.running:
            self._share.running.remove(work)


def _hand_over(told: Sequence[tuple[Work, Event]]) -> None:
    for work, event in told:
        if work.over or (isinstance(event, Progress) and not work.watched):
            continue
        work.over = not isinstance(event, Progress)
        work.inbox.put(work, event)

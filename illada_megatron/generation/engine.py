"""Denoising of many texts at once: each step is one pass of the model over what every text needs, and any text may come
or go between two steps.

    propose (proposing.py) -> choose (choosing.py) -> reveal (text.py); what is computed again: caching.py;
    when a text ends: ending.py

A text's tokens are a function of itself, its settings and the model: not of what else is in a pass, as far as the
model's rows are (`model.Model.logits`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from illada_megatron.generation import caching
from illada_megatron.generation.choosing import choose
from illada_megatron.generation.constraining import Constraint
from illada_megatron.generation.ending import Decode, End, Search, end_of, search_of
from illada_megatron.generation.model import WHOLE, Model, Part
from illada_megatron.generation.proposing import Credit, Words, guided, propose
from illada_megatron.generation.text import Text

_NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Step:
    """What a pass has done to a text."""

    number: int
    positions: Tensor  # [k] int64: revealed by it
    tokens: Tensor  # [k] int64
    confidence: Tensor  # [k] float64
    computed: int
    """Positions that went through the layers, guidance's among them."""
    end: End | None = None
    """The text is finished."""


@dataclass(eq=False)
class Job:
    """A text in work, and what the engine keeps of it."""

    text: Text
    decode: Decode | None = None
    constraint: Constraint | None = None
    search: Search | None = None
    """Of what ends it."""
    credit: Credit = field(default_factory=Credit)
    history: caching.History = field(default_factory=caching.History)
    kept: list[int] = field(default_factory=list)
    """Of the model's keys and values: the text's, and with guidance those of the text without its prompt."""
    computed: int = 0
    """Positions that went through the layers so far."""


class Engine:
    """Texts in work. One thread at a time calls it."""

    def __init__(self, model: Model, words: Words, pass_tokens: int = 1 << 16) -> None:
        """pass_tokens: most tokens of one pass, unless a single text has more; a step takes several then."""
        self.model = model
        self.words = words
        self.pass_tokens = pass_tokens
        self.jobs: list[Job] = []
        self.in_hand: list[Job] = []
        """See `steps`."""

    def add(
        self,
        text: Text,
        decode: Decode | None = None,
        constraint: Constraint | None = None,
        search: Search | None = None,
    ) -> Job:
        """A text that takes part from the next step on. decode: for stop strings; constraint: of its settings' regex or
        json_schema; search: of what ends the text, None: of its settings' stop_pattern. Raises ValueError where its
        settings ask for what is not there: in a step, that would end the others' too."""
        settings = text.settings
        if settings.end_think_boost and not (self.words.end_think or text.infill):
            raise ValueError("end_think_boost needs a tokenizer that spells </think>")
        if search is None and settings.stop_pattern:
            search = search_of(settings.stop_pattern)
        if (settings.stop or search) and decode is None and not text.infill:
            raise ValueError("stop and stop_pattern need a way to decode tokens")
        if constraint is None and (settings.regex or settings.json_schema) is not None:
            raise ValueError("regex and json_schema need a constraint, made with the tokenizer")
        job = Job(text, decode, constraint, search)
        if text.settings.cache != "none":
            capacity = text.given + (0 if text.infill else text.settings.gen_length)
            branches = 2 if text.settings.guidance else 1
            for _ in range(branches):
                job.kept.append(self.model.keep(capacity))
        self.jobs.append(job)
        return job

    def remove(self, job: Job) -> None:
        """Stop working on it, finished or not."""
        if job in self.jobs:
            self.jobs.remove(job)
        while job.kept:
            self.model.forget(job.kept.pop())

    def step(self) -> list[tuple[Job, Step]]:
        """A step of every text in work. Finished ones are removed. One that has nothing to reveal has no positions."""
        return list(self.steps())

    @torch.no_grad()
    def steps(self) -> Iterator[tuple[Job, Step]]:
        """`step`, a text after the other. An error is that of the texts `in_hand`: the others are as they were before
        or after their step, and may go on."""
        for job in list(self.jobs):
            self.in_hand = [job]
            if not self._has_block(job):
                yield job, self._ended(job)
        for jobs in self._passes():
            self.in_hand = jobs
            parts = [self._parts(job) for job in jobs]
            logits = self.model.logits([part for of_job in parts for part in of_job])
            rows = iter(logits.split([part.wanted.numel() for of_job in parts for part in of_job]))
            for job, of_job in zip(jobs, parts, strict=True):
                self.in_hand = [job]
                yield job, self._revealed(job, of_job, [next(rows) for _ in of_job])
        self.in_hand = []

    def run(self) -> Iterator[tuple[Job, Step]]:
        """All steps until nothing is in work."""
        while self.jobs:
            yield from self.step()

    def _has_block(self, job: Job) -> bool:
        """A text that is done, or asks for nothing, has none."""
        if job.text.block.numel():
            return True
        job.history.begin_block()
        return job.text.next_block()

    def _ended(self, job: Job) -> Step:
        self.remove(job)
        end = End("length", job.text.tokens.numel())
        return Step(job.text.step, _NONE, _NONE, torch.empty(0, dtype=torch.float64), 0, end)

    def _passes(self) -> Iterator[list[Job]]:
        """The jobs, in rows of at most `pass_tokens`."""
        jobs: list[Job] = []
        tokens = 0
        for job in list(self.jobs):
            length = job.text.tokens.numel() * (2 if job.text.settings.guidance else 1)
            if jobs and tokens + length > self.pass_tokens:
                yield jobs
                jobs, tokens = [], 0
            jobs.append(job)
            tokens += length
        if jobs:
            yield jobs

    def _parts(self, job: Job) -> list[Part]:
        """Of the text, and with guidance of the text whose prompt is masked."""
        text, rule = job.text, caching.RULES[job.text.settings.cache]
        positions = rule(text, job.history) if rule is not None else None
        views = [text.tokens]
        if text.settings.guidance:
            views.append(text.tokens.masked_fill(text.prompt, text.mask_token_id))
        if positions is None:
            computed, wanted = views, text.block
        else:
            computed, wanted = [view[positions] for view in views], torch.searchsorted(positions, text.block)
        kept = job.kept or [WHOLE] * len(views)
        return [
            Part(tokens, wanted, positions, one, text.tokens.numel())
            for tokens, one in zip(computed, kept, strict=True)
        ]

    def _revealed(self, job: Job, parts: Sequence[Part], logits: Sequence[Tensor]) -> Step:
        text = job.text
        found = guided(logits[0], logits[1], text.settings.guidance) if len(logits) == 2 else logits[0]
        if job.constraint is not None:
            job.constraint.allow(found, text)
        candidates, confidence = propose(found, text, self.words, job.credit)
        rows = choose(text, candidates, confidence, self.words.eos)
        if job.constraint is not None:
            rows = job.constraint.settle(text, rows, candidates, confidence)
        number = text.step
        positions = text.reveal(rows, candidates[rows], confidence[rows])
        job.history.passed(parts[0].positions is None, positions)
        computed = sum(part.tokens.numel() for part in parts)
        job.computed += computed
        end = self._end(job)
        if end is not None:
            text.cut(end.tokens)
            self.remove(job)
        return Step(number, positions, candidates[rows], confidence[rows], computed, end)

    def _end(self, job: Job) -> End | None:
        """Looked for when a block is done."""
        text = job.text
        if text.block.numel():
            return None
        if not text.infill and (end := end_of(text, self.words.eos, job.decode, job.search)) is not None:
            return end
        return None if text.has_more() else End("length", text.tokens.numel())

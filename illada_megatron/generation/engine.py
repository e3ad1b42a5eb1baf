"""Denoising of many texts at once: each step is one pass of the model over what every text needs, and any text may come
or go between two steps.

    propose (proposing.py) -> choose (choosing.py) -> reveal (text.py); what is computed again: caching.py;
    when a text ends: ending.py

A text's tokens are a function of itself, its settings and the model: not of what else is in a pass, as far as the
model's rows are (`model.Model.logits`).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from illada_megatron.generation import caching
from illada_megatron.generation.choosing import choose
from illada_megatron.generation.constraining import Constraint
from illada_megatron.generation.ending import Decode, End, Search, end_of, search_of
from illada_megatron.generation.model import WHOLE, Divided, Model, Part
from illada_megatron.generation.proposing import Credit, Words, guided, propose
from illada_megatron.generation.text import Text

_NONE = torch.empty(0, dtype=torch.int64)
_log = logging.getLogger("illada.generate")


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
    in_work: bool = False
    """Else it waits until there is room."""
    search: Search | None = None
    """Of what ends it."""
    credit: Credit = field(default_factory=Credit)
    history: caching.History = field(default_factory=caching.History)
    kept: list[int] = field(default_factory=list)
    """Of the model's keys and values: the text's, and with guidance those of the text without its prompt."""
    computed: int = 0
    """Positions that went through the layers so far."""

    @property
    def capacity(self) -> int:
        """Tokens that the text may come to have."""
        return self.text.given + (0 if self.text.infill else self.text.settings.gen_length)

    @property
    def branches(self) -> int:
        """Times that each of them is computed."""
        return 2 if self.text.settings.guidance else 1

    @property
    def kept_tokens(self) -> int:
        """Tokens of which keys and values are kept while it is in work."""
        return 0 if self.text.settings.cache == "none" else self.capacity * self.branches


_Pass = list[tuple[Job, list[Part]]]


class Engine:
    """Texts in work. One thread at a time calls it."""

    def __init__(
        self, model: Model, words: Words, pass_tokens: int = 1 << 16, pass_rows: int = 1 << 12, texts: int = 256
    ) -> None:
        """pass_tokens, pass_rows: most tokens that a pass computes, and rows of logits that it returns, unless a single
        text has more; a step takes several passes then. texts: most in work at the same time; others wait for one to
        end, as they do for room for their keys and values (`Model.kept_tokens`)."""
        self.model = model
        self.words = words
        self.pass_tokens = pass_tokens
        self.pass_rows = pass_rows
        self.texts = texts
        self.jobs: list[Job] = []
        """In the order in which they were added; those in work are the first."""
        self.in_hand: list[Job] = []
        """See `steps`."""

    def add(
        self,
        text: Text,
        decode: Decode | None = None,
        constraint: Constraint | None = None,
        search: Search | None = None,
    ) -> Job:
        """A text that takes part from the next step on, or as soon as there is room. decode: for stop strings;
        constraint: of its settings' regex or json_schema; search: of what ends the text, None: of its settings'
        stop_pattern. Raises ValueError where its settings ask for what is not there: in a step, that would end the
        others' too."""
        settings = text.settings
        if settings.end_think_boost and not (self.words.end_think or text.infill):
            raise ValueError("end_think_boost needs a tokenizer that spells </think>")
        if search is None and settings.stop_pattern:
            search = search_of(settings.stop_pattern)
        if (settings.stop or search) and decode is None and not text.infill:
            raise ValueError("stop and stop_pattern need a way to decode tokens")
        if constraint is None and (settings.regex is not None or settings.json_schema is not None):
            raise ValueError("regex and json_schema need a constraint, made with the tokenizer")
        job = Job(text, decode, constraint, search=search)
        if (needed := job.kept_tokens) > self.model.kept_tokens:
            raise ValueError(
                f"cache {settings.cache!r} keeps keys and values of {needed} tokens, the model of at most "
                f"{self.model.kept_tokens}: set cache to 'none'"
            )
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
        """`step`, a text after the other; until the last, texts are neither added nor removed. An error is that of the
        texts `in_hand`, to be removed: the others are as they were before or after their step, and may go on. A pass
        that fails is made again in halves, down to the text that fails alone; where several ranks share the model they
        cannot begin it again, and the error is that of all its texts."""
        self.in_hand = []
        self._admit()
        for job in self._in_work():
            self.in_hand = [job]
            if not self._has_block(job):
                yield job, self._ended(job)
        for passed in self._passes():
            yield from self._made(passed)
        self.in_hand = []

    def _made(self, passed: _Pass) -> Iterator[tuple[Job, Step]]:
        """The steps of a pass."""
        self.in_hand = [job for job, _ in passed]
        try:
            proposals = list(self._proposals(passed))
        except Exception as error:
            if len(passed) == 1 or (isinstance(self.model, Divided) and self.model.ranks > 1):
                raise
            _log.warning("a pass of %d texts failed, and is made again in halves: %s", len(passed), error)
            proposals = None  # behind `except` what the pass had in memory is free
        if proposals is None:
            half = len(passed) // 2
            yield from self._made(passed[:half])
            yield from self._made(passed[half:])
            return
        for (job, parts), found in zip(passed, proposals, strict=True):
            self.in_hand = [job]
            yield job, self._revealed(job, parts, *found)

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

    def _in_work(self) -> list[Job]:
        return list(takewhile(lambda job: job.in_work, self.jobs))

    def _admit(self) -> None:
        """In the order in which they were added, so that a long text is not overtaken by all that are shorter."""
        in_work = self._in_work()
        kept = sum(job.kept_tokens for job in in_work)
        for job in self.jobs[len(in_work) : self.texts]:
            kept += job.kept_tokens
            if kept > self.model.kept_tokens:
                break
            self.in_hand = [job]
            for _ in range(job.branches if job.kept_tokens else 0):
                job.kept.append(self.model.keep(job.capacity))
            job.in_work = True

    def _passes(self) -> Iterator[_Pass]:
        """What the texts in work need, in passes of at most `pass_tokens` and `pass_rows`."""
        of_pass: _Pass = []
        tokens = rows = 0
        for job in self._in_work():
            self.in_hand = [job]
            parts = self._parts(job)
            more_tokens = sum(part.tokens.numel() for part in parts)
            more_rows = sum(part.wanted.numel() for part in parts)
            if of_pass and (tokens + more_tokens > self.pass_tokens or rows + more_rows > self.pass_rows):
                yield of_pass
                of_pass, tokens, rows = [], 0, 0
            of_pass.append((job, parts))
            tokens, rows = tokens + more_tokens, rows + more_rows
        if of_pass:
            yield of_pass

    def _proposals(self, passed: _Pass) -> Iterator[tuple[Tensor, Tensor, Credit]]:
        """Candidates [m] int64, confidence [m] and the credit after it of each text of a pass. They leave the device
        together: a GPU waits once."""
        texts = [job.text for job, _ in passed]
        rows = [text.block.numel() for text in texts]
        logits = self._logits(passed)
        for (job, _), some in zip(passed, logits.split(rows), strict=True):
            if job.constraint is not None:
                job.constraint.allow(some, job.text)
        found, credits = propose(logits, texts, self.words, [job.credit for job, _ in passed])
        for one, credit in zip(found.cpu().split(rows, dim=1), credits, strict=True):
            yield one[0].to(torch.int64), one[1], credit

    def _logits(self, passed: _Pass) -> Tensor:
        """[m, v] of the texts' blocks, one after the other, guidance done. What it needs of texts without their prompts
        comes behind all others, so that no row is copied."""
        conditional = [parts[0] for _, parts in passed]
        rows = [part.wanted.numel() for part in conditional]
        unconditional = [part for _, parts in passed for part in parts[1:]]
        every = self.model.logits([*conditional, *unconditional])
        logits = every[: sum(rows)]
        others = iter(every[sum(rows) :].split([part.wanted.numel() for part in unconditional]))
        for (job, parts), some in zip(passed, logits.split(rows), strict=True):
            if len(parts) == 2:
                some.copy_(guided(some, next(others), job.text.settings.guidance))
        return logits

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

    def _revealed(
        self, job: Job, parts: Sequence[Part], candidates: Tensor, confidence: Tensor, credit: Credit
    ) -> Step:
        text = job.text
        if confidence.isnan().any() or (candidates >= self.model.vocab_size).any():
            raise ValueError(f"the model returned NaN, or no token is possible, at step {text.step}")
        job.credit = credit
        rows = choose(text, candidates, confidence, self.words.eos)
        if job.constraint is not None:
            rows = job.constraint.settle(text, rows, candidates)
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
        if not text.infill and (end := end_of(text, self.words, job.decode, job.search)) is not None:
            return end
        return None if text.has_more() else End("length", text.tokens.numel())

"""What the engine does at one time has limits, and these change no text."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from markov import MASK, cycle, denoised
from test_layers import SETTINGS, prompts
from torch import Tensor

from illada_megatron.generation import Engine, FunctionModel, Generator, Part, Settings, Text, Words

KEPT_TOKENS, TEXTS = 250, 3


def test_texts_wait_for_room(place: Path) -> None:
    texts, settings = prompts(16), [SETTINGS[(4, 5, 0, 7)[number % 4]] for number in range(16)]
    with Generator.open(place / "run", "cpu", place / "tokenizer.json") as generator:
        expected = [one.tokens.tolist() for one in generator.generate(texts, settings)]
        generator.model.kept_tokens = KEPT_TOKENS
        engine = Engine(generator.model, generator.words, texts=TEXTS)
        jobs = [engine.add(*generator.text(*one)) for one in zip(texts, settings, strict=True)]
        most_texts = most_tokens = 0
        while engine.jobs:
            engine.step()
            in_work = [job for job in engine.jobs if job.in_work]
            assert in_work == engine.jobs[: len(in_work)]
            assert len(generator.model._kept) == sum(len(job.kept) for job in in_work)
            most_texts = max(most_texts, len(in_work))
            most_tokens = max(most_tokens, sum(job.kept_tokens for job in in_work))
    assert [job.text.tokens.tolist() for job in jobs] == expected
    assert most_texts == TEXTS
    assert 0 < most_tokens <= KEPT_TOKENS


def test_a_text_that_never_has_room_is_refused(place: Path) -> None:
    with Generator.open(place / "run", "cpu", place / "tokenizer.json") as generator:
        generator.model.kept_tokens = 20
        with pytest.raises(ValueError, match=r"'prefix' keeps keys and values of 25 tokens, .* at most 20: set cache"):
            generator.generate(prompts(1), SETTINGS[4])


def test_a_function_keeps_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"'dual' keeps keys and values of 5 tokens, .* at most 0: set cache to 'none'"
    ):
        denoised(cycle(), [1], Settings(gen_length=4, block_length=4, steps=4, cache="dual"))


class _Passes(FunctionModel):
    """Of a function, with what each pass had to do."""

    def logits(self, parts: Sequence[Part]) -> Tensor:
        self.seen.append([(part.tokens.numel(), part.wanted.numel()) for part in parts])
        return super().logits(parts)

    seen: list[list[tuple[int, int]]]


def test_a_pass_has_as_many_tokens_and_rows_as_it_may() -> None:
    settings = Settings(gen_length=8, block_length=4, steps=4)
    model = _Passes(cycle(), 6)
    model.seen = []
    engine = Engine(model, Words(MASK), pass_tokens=40, pass_rows=9)
    texts = [[1 + number % 5] * (1 + 9 * (number % 3)) for number in range(12)]
    jobs = [engine.add(Text(torch.tensor(text), settings, MASK)) for text in texts]
    steps = sum(1 for _ in engine.run())
    assert steps == 12 * 8
    sizes = [[sum(column) for column in zip(*parts, strict=True)] for parts in model.seen]
    assert all(tokens <= 40 and rows <= 9 for tokens, rows in sizes)
    assert max(rows for _, rows in sizes) >= 8
    assert max(tokens for tokens, _ in sizes) > 30
    for text, job in zip(texts, jobs, strict=True):
        assert job.text.tokens.tolist() == denoised(cycle(), text, settings).tokens.tolist()

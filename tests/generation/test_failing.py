"""One text's failure is its own, whatever shares its passes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from illada_megatron.generation import Engine, FunctionModel, Job, Part, Settings, Text, Words
from illada_megatron.generation.proposing import Credit, propose
from illada_megatron.ops import largest

VOCABULARY, MASK, EOS, BAD = 70, 5, 2, 9
_LOGITS = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3


def predict(tokens: Tensor) -> Tensor:
    found = _LOGITS[tokens[0]].mean(0)[None] + _LOGITS[tokens[0]]
    return (found * torch.nan if int(tokens[0, 0]) == BAD else found)[None].clone()


class Model(FunctionModel):
    """Fails where a pass has more than `most` texts, or one that begins with BAD."""

    most = 1 << 20
    fails = True

    def logits(self, parts: Sequence[Part]) -> Tensor:
        self.passes.append(len(parts))
        if len(parts) > self.most:
            raise torch.OutOfMemoryError("no room")
        if self.fails and any(int(part.tokens[0]) == BAD for part in parts):
            raise RuntimeError("the text is bad")
        return super().logits(parts)

    def __init__(self) -> None:
        super().__init__(predict, VOCABULARY)
        self.passes: list[int] = []


def added(engine: Engine, first: int = 6, **settings: Any) -> Job:
    chosen = Settings(**{"gen_length": 8, "block_length": 8, "steps": 8} | settings)
    return engine.add(Text(torch.tensor([first, 7, 8]), chosen, MASK))


def outcome(engine: Engine, jobs: Sequence[Job]) -> tuple[list[list[float]], list[Job]]:
    """Tokens and confidence of the jobs, after all steps, and those that failed."""
    failed: list[Job] = []
    for _ in range(100):
        try:
            engine.step()
        except (RuntimeError, ValueError):
            assert len(engine.in_hand) == 1
            failed += engine.in_hand
            for job in list(engine.in_hand):
                engine.remove(job)
        if not engine.jobs:
            return [[*job.text.tokens.tolist(), *job.text.confidence.tolist()] for job in jobs], failed
    raise AssertionError("texts are left")


def alone(**settings: Any) -> list[float]:
    engine = Engine(Model(), Words(MASK, EOS))
    return outcome(engine, [added(engine, **settings)])[0][0]


@pytest.mark.parametrize("fails", [True, False], ids=["raises", "returns NaN"])
@pytest.mark.parametrize("settings", [{}, {"credit": True}, {"credit": True, "temperature": 1.0}])
def test_those_fail_that_fail_alone(settings: dict[str, Any], fails: bool) -> None:
    model = Model()
    model.fails = fails
    engine = Engine(model, Words(MASK, EOS))
    jobs = [added(engine, BAD if number in (0, 3) else 6, **settings) for number in range(6)]
    found, failed = outcome(engine, jobs)
    assert failed == [jobs[0], jobs[3]]
    assert all(found[number] == alone(**settings) for number in (1, 2, 4, 5))


def test_a_pass_that_has_no_room_is_made_in_halves() -> None:
    model = Model()
    model.most = 2
    engine = Engine(model, Words(MASK, EOS))
    jobs = [added(engine, credit=True) for _ in range(8)]
    found, failed = outcome(engine, jobs)
    assert not failed
    assert found == [alone(credit=True)] * 8
    assert model.passes[:7] == [8, 4, 2, 2, 4, 2, 2]


def test_of_several_ranks_the_error_is_everybodys() -> None:
    class Ranks(Model):
        ranks, leads = 2, True

        def follow(self) -> Any: ...

        def end(self, said: Any) -> None: ...

    model = Ranks()
    engine = Engine(model, Words(MASK, EOS))
    jobs = [added(engine, first) for first in (6, BAD)]
    with pytest.raises(RuntimeError, match="bad"):
        engine.step()
    assert engine.in_hand == jobs
    assert model.passes == [2]


@pytest.mark.parametrize("what", ["_parts", "_admit"])
def test_what_fails_before_a_pass_is_in_hand(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Model(), Words(MASK, EOS))
    good, bad, other = (added(engine) for _ in range(3))
    parts = engine._parts

    def failing(job: Job) -> list[Part]:
        if job is bad:
            raise MemoryError
        return parts(job)

    if what == "_parts":
        monkeypatch.setattr(engine, "_parts", failing)
    else:
        monkeypatch.setattr(type(bad), "kept_tokens", property(lambda job: int(job is bad)))
        monkeypatch.setattr(engine.model, "kept_tokens", 10)
    with pytest.raises((MemoryError, ValueError)):
        engine.step()
    assert engine.in_hand == [bad]
    engine.remove(bad)
    assert outcome(engine, [good, other])[0] == [alone()] * 2


@pytest.mark.parametrize("kind", [{}, {"remasking": "margin"}, {"top_p": 0.5}, {"top_k": 3}])
def test_a_temperature_near_zero(kind: dict[str, Any]) -> None:
    for temperature in (1e-310, 1e-7):
        with pytest.raises(ValueError, match="temperature must be 0 or from 1e-06 up"):
            Settings(temperature=temperature)
    coldest = alone(temperature=1e-6, **kind)
    assert coldest == alone(**({"remasking": kind["remasking"]} if "remasking" in kind else {}))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_id_is_out_of_range(value: float) -> None:
    """It would be looked up."""
    text = Text(torch.tensor([6]), Settings(gen_length=4, block_length=4, steps=4, temperature=1.0), MASK)
    text.next_block()
    logits = torch.zeros(4, VOCABULARY)
    logits[1] = value
    (candidates, confidence), _ = propose(logits, [text], Words(MASK), [Credit()])
    assert (candidates < VOCABULARY).all()
    assert confidence.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", [{"temperature": 1.0, "top_p": 0.9, "top_k": 50}, {"remasking": "entropy"}])
def test_proposals_are_made_a_few_rows_at_a_time(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 what is made of 32 rows of iLLaDA's 155,136 words would be 250 MB at one time."""
    settings = Settings(gen_length=32, block_length=32, steps=32, **kind)
    text = Text(torch.tensor([6]), settings, MASK)
    text.next_block()
    logits = torch.randn(32, 155_136, generator=torch.Generator().manual_seed(1))
    sizes: list[int] = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.dtype == torch.float64:
                sizes.append(found.numel())
            return found

    with Sizes():
        few, _ = propose(logits.clone(), [text], Words(MASK), [Credit()])
    assert max(sizes) <= 1 << 18
    monkeypatch.setattr(largest, "_CACHED", 1 << 40)
    many, _ = propose(logits, [text], Words(MASK), [Credit()])
    assert torch.equal(few[0], many[0])
    torch.testing.assert_close(few[1], many[1], rtol=1e-12, atol=0)

"""300 random settings on tiny random models, several texts at once in one engine: each as `obvious` has it alone."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from string import ascii_letters
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from obvious import Outcome, obvious

from illada_megatron.generation import Engine, FunctionModel, Settings, Text, Words

SEED = 27
GROUPS = 10
BATCHES = (1, 2, 4, 8, 15)  # texts of a group's engines, each with a model of its own

Float = NDArray[np.float64]


class Tiny:
    """Logits depend on a position, its token, both neighbours and the whole text; no two are equal."""

    def __init__(self, rng: random.Random) -> None:
        numbers = np.random.default_rng(rng.getrandbits(64))
        self.v = v = rng.randint(8, 40)
        self.words = v - rng.randint(0, 3)
        self.mask = rng.randrange(v)
        others = [token for token in range(self.words) if token != self.mask]
        rng.shuffle(others)
        self.eos = None if rng.random() < 0.1 else others.pop()
        a, b, c = others[:3]
        self.end_think = rng.choice([[], [a, b], [a, b], [a, b, c], [a, a, b], [a, b, a]])
        self.own, self.left, self.right = (numbers.normal(size=(v, v)) for _ in range(3))
        self.embedding, self.head = numbers.normal(size=(v, 16)), numbers.normal(size=(16, v)) / 2
        self.place = numbers.normal(size=(64, v))
        self.scale = rng.uniform(0.8, 1.8)
        if self.eos is not None:
            self.own[self.mask, self.eos] += rng.uniform(0, 2)

    def logits(self, tokens: list[int]) -> Float:
        """`[s, v]`"""
        ids = np.array(tokens, np.int64)
        padded = np.concatenate(([self.mask], ids, [self.mask]))
        text = np.tanh(self.embedding[ids].sum(0) / math.sqrt(len(ids))) @ self.head
        local = self.own[ids] + self.left[padded[:-2]] + self.right[padded[2:]] + self.place[: len(ids)]
        return self.scale * (local + text)

    def predict(self, tokens: list[int]) -> list[list[float]]:
        return self.logits(tokens).tolist()

    def predict_tensor(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[1, s]` to `[1, s, v]`."""
        return torch.from_numpy(self.logits(tokens[0].tolist()))[None]


def decode(ids: Any) -> str:
    """One letter a token; of some two characters, of some none."""
    return "".join(spelling(int(token)) for token in ids)


def spelling(token: int) -> str:
    if token % 11 == 7:
        return ""
    return ascii_letters[token] + ("'" if token % 6 == 5 else "")


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    model: Tiny
    ids: list[int]
    settings: Settings
    infill: bool

    def outcome(self, **changes: Any) -> Outcome:
        """What `obvious` makes of it, some settings changed."""
        model, settings = self.model, replace(self.settings, **changes)
        return obvious(
            model.predict,
            self.ids,
            settings,
            model.mask,
            model.eos,
            model.end_think,
            model.words,
            decode,
            self.infill,
        )

    def __str__(self) -> str:
        m = self.model
        facts = f"v {m.v}, words {m.words}, mask {m.mask}, eos {m.eos}, end_think {m.end_think}, infill {self.infill}"
        return f"{self.name}: {facts}\nids {self.ids}\n{self.settings}"


def random_settings(rng: random.Random, model: Tiny) -> Settings:
    def often(probability: float, value: Callable[[], Any], otherwise: Any) -> Any:
        return value() if rng.random() < probability else otherwise

    reveal = rng.choice(["steps", "threshold", "factor", "hierarchy"])
    remasking = rng.choice(["low_confidence", "margin", "entropy"] + ["random"] * (reveal == "steps"))
    block_length = often(0.85, lambda: rng.randint(1, 10), None)
    threshold = rng.uniform(0.2, 0.9)
    temperature = often(0.6, lambda: rng.uniform(0.3, 1.5), 0.0)
    return Settings(
        gen_length=rng.randint(1, 24),
        block_length=block_length,
        fixed_length=rng.random() < 0.4,
        steps=rng.randint(1, block_length or 12),
        remasking=remasking,
        reveal=reveal,
        threshold=threshold,
        low_threshold=rng.uniform(0.1, 1) * threshold,
        factor=rng.uniform(0.3, 2.5),
        credit=rng.random() < 0.3,
        temperature=temperature,
        top_k=often(0.4, lambda: rng.randint(1, 6), 0) if temperature else 0,
        top_p=often(0.4, lambda: rng.uniform(0.3, 0.95), 1.0) if temperature else 1.0,
        repetition_penalty=often(0.35, lambda: rng.uniform(0.6, 2.5), 1.0),
        guidance=often(0.35, lambda: rng.uniform(0.1, 2), 0.0),
        seed=rng.choice([0, rng.randrange(1000), rng.getrandbits(64)]),
        eos=rng.choice(["stop", "stop", "last", "last", "never"]),
        stop=tuple(often(0.5, lambda: random_stops(rng, model), ())),
        stop_pattern=often(0.35, lambda: random_pattern(rng, model), None),
        end_think_boost=often(0.4, lambda: rng.choice([rng.uniform(1, 15), 100.0]), 0.0) if model.end_think else 0.0,
        end_think_power=rng.choice([0.0, 1.0, 2.0, 3.0, 0.5]),
    )


def random_stops(rng: random.Random, model: Tiny) -> list[str]:
    stops = [decode(rng.choices(range(model.words), k=rng.randint(1, 2))) for _ in range(rng.randint(1, 8))]
    return [stop for stop in stops if stop]


def random_pattern(rng: random.Random, model: Tiny) -> str:
    a, b, c, d = (ascii_letters[rng.randrange(model.words)] for _ in range(4))
    return rng.choice(
        [f"[{a}{b}{c}].[^{d}]", f"{a}.*{b}", f"(?<={a})[^{b}]", f"[{a}{b}{c}{d}]$", f"^[^{a}{b}]{{3,}}{c}"]
    )


def random_text(rng: random.Random, model: Tiny, infill: bool) -> list[int]:
    """A prompt of 0 to 12 tokens, or a text with up to four gaps."""
    given = [token for token in range(model.v) if token != model.mask]
    if not infill:
        ids = rng.choices(given, k=rng.choice([0, rng.randint(0, 12), rng.randint(1, 12)]))
        ends = rng.choice([[], [], [], model.end_think[:1], model.end_think[:2], model.end_think])
        return (ids + ends)[-12:]
    ids = []
    for _ in range(rng.randint(1, 4)):
        ids += rng.choices(given, k=rng.randint(0, 5)) + [model.mask] * rng.randint(1, 6)
    return ids + rng.choices(given, k=rng.randint(0, 5))


@cache
def batches(group: int) -> list[list[Case]]:
    rng = random.Random(f"{SEED}/{group}")
    result = []
    for size in BATCHES:
        model, batch = Tiny(rng), []
        for i in range(size):
            infill = rng.random() < 0.25
            name = f"group {group}, batch of {size}, text {i}"
            case = Case(name, model, random_text(rng, model, infill), random_settings(rng, model), infill)
            batch.append(case if infill or rng.random() < 0.5 else stopped_in_its_text(rng, case))
        result.append(batch)
    return result


def stopped_in_its_text(rng: random.Random, case: Case) -> Case:
    """With a stop string, or a pattern, that its text has: few of the random ones are ever met."""
    on = case.outcome(stop=(), stop_pattern=None)
    text = decode(on.tokens[len(case.ids) :])
    if not text:
        return case
    draws = 5 if on.finish == "eos" else 2  # late, to be in the block of the EOS
    start = max(rng.randrange(len(text)) for _ in range(draws))
    stop = text[start : start + rng.randint(2, 4)]
    how = rng.choice(["stop", "one of some", "pattern"])
    if how == "pattern":
        settings = replace(case.settings, stop=(), stop_pattern=f"{stop[0]}.{{{len(stop) - 1}}}")
    elif how == "stop":
        settings = replace(case.settings, stop=(stop,), stop_pattern=None)
    else:
        settings = replace(case.settings, stop=(*case.settings.stop, stop))
    return replace(case, settings=settings)


@cache
def alone(case: Case) -> Outcome:
    return case.outcome()


def together(batch: list[Case]) -> list[Outcome]:
    """What one engine makes of them all."""
    model = batch[0].model
    engine = Engine(
        FunctionModel(model.predict_tensor, model.v),
        Words(model.mask, model.eos, tuple(model.end_think), model.words),
    )
    jobs = [
        engine.add(Text(torch.tensor(case.ids, dtype=torch.int64), case.settings, model.mask, case.infill), decode)
        for case in batch
    ]
    ends: dict[int, Any] = {}
    for job, step in engine.run():
        if step.end is not None:
            assert id(job) not in ends, "a text ended twice"
            ends[id(job)] = step.end
    return [
        Outcome(job.text.tokens.tolist(), job.text.order.tolist(), ends[id(job)].finish, ends[id(job)].characters)
        for job in jobs
    ]


@pytest.mark.parametrize("group", range(GROUPS))
def test_texts_together_are_what_each_is_alone(group):
    for batch in batches(group):
        for case, found in zip(batch, together(batch), strict=True):
            assert found == alone(case), str(case)


class Even(Tiny):
    """All positions have the same logits, and of the most probable tokens there are two."""

    def __init__(self) -> None:
        self.v = self.words = 8
        self.mask, self.eos, self.end_think = 0, None, []

    def logits(self, tokens: list[int]) -> Float:
        return np.tile(np.array([9.0, -1.0, 0.5, 3.0, 0.0, 3.0, 1.0, -2.0]), (len(tokens), 1))


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        (Settings(gen_length=7, block_length=7, steps=3), [0, 0, 0, 1, 1, 2, 2]),
        (Settings(gen_length=3, block_length=3, steps=3, remasking="margin"), [0, 1, 2]),
        (Settings(gen_length=3, block_length=3, reveal="threshold", threshold=0.9), [0, 1, 2]),
        (Settings(gen_length=3, block_length=3, reveal="threshold", threshold=0.1), [0, 0, 0]),
        # of 0.4 rank 2 needs 1 - 1.9 / 3 = 0.37, rank 3 1 - 1.9 / 4 = 0.53
        (Settings(gen_length=5, block_length=5, reveal="factor", factor=1.9), [0, 0, 1, 1, 2]),
        # a run's first, which is the whole block's most confident, too
        (Settings(gen_length=3, block_length=3, reveal="hierarchy", threshold=0.9, low_threshold=0.1), [0, 1, 2]),
    ],
)
def test_of_equals_the_leftmost_position_and_the_lowest_token(settings, order):
    case = Case("ties", Even(), [4, 4], settings, False)
    assert alone(case) == Outcome([4, 4] + [3] * len(order), [-1, -1, *order], "length", None)
    assert together([case]) == [alone(case)]


class Torn(Even):
    """Two most probable tokens everywhere, at odd positions end-of-text and another: every margin is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.eos = 2

    def logits(self, tokens: list[int]) -> Float:
        odd = np.arange(len(tokens))[:, None] % 2 == 1
        return np.where(odd, [9.0, -1.0, 3.0, 3.0, 0.0, 1.0, 1.0, 0.5], [9.0, -1.0, 0.5, 0.0, 3.0, 3.0, 1.0, 0.5])


def test_end_of_text_ranks_last_at_a_margin_of_0_too():
    case = Case(
        "ties", Torn(), [4, 4], Settings(gen_length=4, block_length=4, steps=2, eos="last", remasking="margin"), False
    )
    assert alone(case) == Outcome([4, 4, 4, 2], [-1, -1, 0, 1], "eos", None)
    assert together([case]) == [alone(case)]


def test_the_settings_reach_all_that_they_are_to_test():
    counts: Counter[str] = Counter()
    for case in (case for group in range(GROUPS) for batch in batches(group) for case in batch):
        for name, occurs in features(case, alone(case)).items():
            if counts[name] < least(name) and occurs():
                counts[name] += 1
    assert not {name: counts[name] for name in FEATURES if counts[name] < least(name)}


def least(feature: str) -> int:
    rare = {"stopped before an EOS": 1, "no end-of-text token": 5}
    return 3 if feature.startswith("rule ") else rare.get(feature, 10)


# What a setting is changed to, to see if it made a difference
PLAIN: dict[str, dict[str, Any]] = {
    "fixed_length": {"fixed_length": False},
    "remasking": {"remasking": "low_confidence"},
    "steps": {"steps": 1},
    "reveal": {"reveal": "steps", "steps": 1},
    "credit": {"credit": False},
    "temperature": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    "top_k": {"top_k": 0},
    "top_p": {"top_p": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.0},
    "guidance": {"guidance": 0.0},
    "seed": {"seed": 0},
    "eos": {"eos": "stop"},
    "stop_pattern": {"stop_pattern": None},
    "end_think_boost": {"end_think_boost": 0.0},
    "end_think_power": {"end_think_power": 0.0},
}
RULES = {
    f"rule {reveal} by {remasking}"
    for reveal in ("steps", "threshold", "factor", "hierarchy")
    for remasking in ("low_confidence", "margin", "entropy")
} | {"rule steps by random"}
OTHERS = {
    "eos=last mattered",
    "eos=never mattered",
    "hierarchy was not threshold",
    "several tokens in one step of many",
    "more masks than a step of factor",
    "infill",
    "infill of several gaps",
    "infill in several blocks",
    "a block over two gaps",
    "no prompt",
    "no end-of-text token",
    "a shorter last block",
    "one block of all",
    "finish stop",
    "finish eos",
    "finish length",
    "stopped before an EOS",
    "stopped across blocks",
    "ended before the last masks",
    "a prompt with a part of </think>",
    "</think> completed",
}
FEATURES = RULES | OTHERS | {f"{name} mattered" for name in PLAIN}


def features(case: Case, outcome: Outcome) -> dict[str, Callable[[], bool]]:
    """Questions: what of FEATURES a text and its outcome have."""

    def matters(**changes: Any) -> Callable[[], bool]:
        return lambda: case.outcome(**changes) != outcome

    settings = case.settings
    found = {f"{name} mattered": matters(**plain) for name, plain in PLAIN.items() if uses(settings, name)}
    found[f"rule {settings.reveal} by {settings.remasking}"] = lambda: True
    if settings.eos != "stop":
        found[f"eos={settings.eos} mattered"] = found["eos mattered"]
    if settings.reveal == "hierarchy":
        found["hierarchy was not threshold"] = matters(reveal="threshold")
    if settings.reveal == "factor":
        found["more masks than a step of factor"] = matters(factor=1e9)
    if settings.reveal != "steps":
        revealed = Counter(step for step in outcome.order if step >= 0)
        found["several tokens in one step of many"] = lambda: len(revealed) > 2 and max(revealed.values()) > 1
    found["no end-of-text token"] = lambda: case.model.eos is None
    return found | (of_infill(case) if case.infill else of_continuing(case, outcome))


def uses(settings: Settings, name: str) -> bool:
    return getattr(settings, name) != PLAIN[name][name] and (name != "steps" or settings.reveal == "steps")


def of_infill(case: Case) -> dict[str, Callable[[], bool]]:
    masks = [i for i, token in enumerate(case.ids) if token == case.model.mask]
    gaps = [i for i in masks if i - 1 not in masks]
    length = case.settings.block_length or len(masks)
    blocks = [masks[i : i + length] for i in range(0, len(masks), length)]
    return {
        "infill": lambda: True,
        "infill of several gaps": lambda: len(gaps) > 1,
        "infill in several blocks": lambda: len(blocks) > 1,
        "a block over two gaps": lambda: any(block[-1] - block[0] >= len(block) for block in blocks),
    }


def of_continuing(case: Case, outcome: Outcome) -> dict[str, Callable[[], bool]]:
    settings, think = case.settings, case.model.end_think
    generated = outcome.tokens[len(case.ids) :]
    length = settings.block_length or settings.gen_length
    boosted = bool(think and settings.end_think_boost)

    def before_eos() -> bool:
        return case.outcome(stop=(), stop_pattern=None).tokens == [*outcome.tokens, case.model.eos]

    def across_blocks() -> bool:
        last_block = (len(generated) - 1) // length * length
        return outcome.characters is not None and outcome.characters < len(decode(generated[:last_block]))

    return {
        f"finish {outcome.finish}": lambda: True,
        "no prompt": lambda: not case.ids,
        "one block of all": lambda: settings.block_length is None,
        "a shorter last block": lambda: len(generated) == settings.gen_length > length and len(generated) % length > 0,
        "ended before the last masks": lambda: settings.fixed_length and len(generated) <= settings.gen_length - length,
        "stopped before an EOS": lambda: outcome.finish == "stop" and before_eos(),
        "stopped across blocks": lambda: outcome.finish == "stop" and across_blocks(),
        "a prompt with a part of </think>": lambda: boosted and ends_in_part(case.ids, think),
        "</think> completed": lambda: boosted and any(generated[i : i + len(think)] == think for i in range(99)),
    }


def ends_in_part(prompt: list[int], think: list[int]) -> bool:
    return any(prompt[-n:] == think[:n] for n in range(1, len(think)))

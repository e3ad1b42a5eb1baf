"""Samplers against exact models of small Markov chains, where the right answers can be computed."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from markov import MASK, MarkovPredictor, cycle, denoised, drift

from illada_megatron.generation import GIVEN, Settings
from illada_megatron.generation.text import masks_per_step


def config(**fields) -> Settings:
    return Settings(**{"steps": 4, "block_length": 4, "gen_length": 8} | fields)


def the_cycle(start: int, length: int) -> list[int]:
    return [1 + (start - 1 + i) % 5 for i in range(length)]


@pytest.mark.parametrize(("steps", "block_length"), [(4, 4), (2, 4), (1, 2), (8, 8), (3, None), (1, 1)])
def test_greedy_continues_the_cycle(steps, block_length):
    result = denoised(cycle(), [3, 4], config(steps=steps, block_length=block_length))
    assert result.tokens.tolist() == the_cycle(3, 10)


def test_greedy_reveals_what_is_most_certain_first():
    """One token a step: certainty falls with the distance from the prompt, so it grows from left to right; with the end
    given, from right to left."""
    result = denoised(cycle(), [3], config())
    assert result.order.tolist() == [GIVEN, 0, 1, 2, 3, 4, 5, 6, 7]
    backwards = denoised(cycle(), [MASK] * 6 + [1], config(steps=6, block_length=None), infill=True)
    assert backwards.tokens.tolist() == the_cycle(5, 7)
    assert backwards.order.tolist() == [5, 4, 3, 2, 1, 0, GIVEN]


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_as_many_a_step_as_scheduled(remasking, temperature):
    """Blocks of 7, 7 and 3 in 4 steps: 2, 2, 2, 1 twice, then the short block one at a time."""
    predict = cycle()
    cfg = config(steps=4, block_length=7, gen_length=17, remasking=remasking, temperature=temperature)
    result = denoised(predict, [1, 2], cfg)
    assert [(result.order == step).sum() for step in range(result.steps)] == [2, 2, 2, 1, 2, 2, 2, 1, 1, 1, 1]
    assert predict.calls == result.steps == 11
    blocks = [range(4), range(4, 8), range(8, 11)]
    for block, positions in zip(blocks, result.order[2:].split(7), strict=True):
        assert set(positions.tolist()) == set(block), "a block revealed outside its own steps"
    assert result.appended.tolist() == [GIVEN] * 2 + [0] * 7 + [4] * 7 + [8] * 3


def test_masks_per_step():
    assert masks_per_step(10, 4) == [3, 3, 2, 2]
    assert masks_per_step(3, 5) == [1, 1, 1]
    assert masks_per_step(0, 5) == []


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 50.0])
def test_given_tokens_stay_and_masks_are_never_produced(remasking, temperature):
    """The predictor's favourite is the mask token itself; a temperature of 50 makes all tokens likely."""
    prompt = torch.tensor([2, 2, 5])
    for seed in range(20):
        cfg = config(temperature=temperature, remasking=remasking, seed=seed)
        result = denoised(cycle(), prompt, cfg)
        assert result.tokens[:3].tolist() == prompt.tolist() == [2, 2, 5]
        assert result.order[:3].tolist() == [GIVEN] * 3
        assert len(result.tokens) == 11
        assert (result.tokens != MASK).all()
        holes = torch.tensor([1, MASK, MASK, 4, MASK])
        filled = denoised(cycle(), holes, cfg, infill=True)
        assert holes.tolist() == [1, MASK, MASK, 4, MASK], "the caller's tokens were overwritten"
        assert (filled.tokens != MASK).all()
        assert filled.tokens[[0, 3]].tolist() == [1, 4]
        assert torch.equal(filled.order == GIVEN, holes != MASK)


def test_eos_ends_the_text_inside_its_block():
    predict = cycle()
    result = denoised(predict, [1], config(), eos=4)
    assert result.tokens.tolist() == [1, 2, 3, 4]
    assert predict.calls == 4, "a block was denoised after EOS"
    assert len(result.order) == len(result.appended) == 4


def test_eos_in_the_prompt_does_not_end_the_text():
    assert len(denoised(cycle(), [4, 5], config(gen_length=3), eos=4).tokens) == 5


def test_a_stop_string_is_looked_for_after_each_block():
    seen = []

    def decode(generated):
        seen.append(generated)
        return "".join(map(str, generated))

    result = denoised(cycle(), [1, 2], config(block_length=2, steps=2, gen_length=20, stop=("51",)), decode=decode)
    assert seen == [[3, 4], [3, 4, 5, 1]]
    assert result.tokens.tolist() == [1, 2, 3, 4, 5, 1]


def test_infilling_uses_both_sides():
    """Between two tokens of a chain that only rises, the answer depends on what comes after the gap."""
    cfg = config(steps=1, block_length=None)
    assert denoised(drift(), [1, MASK, 3], cfg, infill=True).tokens.tolist() == [1, 2, 3]
    assert denoised(drift(), [1, MASK, 1], cfg, infill=True).tokens.tolist() == [1, 1, 1]
    assert denoised(drift(), [MASK, 1], cfg, infill=True).tokens.tolist() == [1, 1]
    assert denoised(drift(), [2, MASK], cfg, infill=True).tokens.tolist() == [2, 2]


def test_infilling_one_at_a_time_follows_the_exact_posterior():
    """Each step's position and token are those of the largest exact posterior, found by enumerating all fillings."""
    predict = drift()
    tokens = [1, MASK, MASK, 2, MASK, MASK, MASK, 4]
    result = denoised(predict, tokens, config(steps=5, block_length=None), infill=True)
    current = list(tokens)
    for step in range(5):
        holes = [i for i, token in enumerate(current) if token == MASK]
        mass: Counter = Counter()
        for filling in itertools.product(range(1, 5), repeat=len(holes)):
            states = list(current)
            for hole, token in zip(holes, filling, strict=True):
                states[hole] = token
            weight = np.exp(predict.log_probability(tuple(states)))
            for hole, token in zip(holes, filling, strict=True):
                mass[hole, token] += weight
        best = max(mass.values())
        (position,) = (result.order == step).nonzero().flatten().tolist()
        token = int(result.tokens[position])
        assert mass[position, token] == pytest.approx(best, rel=1e-9)
        current[position] = token


def test_infilling_in_blocks_goes_left_to_right():
    tokens = [MASK, 2, MASK, MASK, 5, MASK, MASK, 3]
    result = denoised(cycle(), tokens, config(steps=2, block_length=2), infill=True)
    assert result.tokens.tolist() == the_cycle(1, 8)
    blocks = [sorted(result.order[positions].tolist()) for positions in ([0, 2], [3, 5], [6])]
    assert blocks == [[0, 1], [2, 3], [4]]


def test_infilling_nothing_calls_nothing():
    predict = cycle()
    result = denoised(predict, [1, 2, 3], config(), infill=True)
    assert (result.tokens.tolist(), result.steps, predict.calls) == ([1, 2, 3], 0, 0)


def test_no_prompt():
    result = denoised(cycle(), [], config(gen_length=4))
    assert result.tokens.tolist() == the_cycle(int(result.tokens[0]), 4)


def test_seeds():
    """The same seed gives the same text, another seed another, whatever torch's own generator has done."""
    predict = MarkovPredictor(torch.full((5,), 0.2), torch.full((5, 5), 0.2))
    cfg = {"remasking": "random", "temperature": 1.0, "gen_length": 32, "block_length": 32, "steps": 8}
    first = denoised(predict, [1], Settings(**cfg, seed=3))
    torch.manual_seed(99)
    again = denoised(predict, [1], Settings(**cfg, seed=3))
    other = denoised(predict, [1], Settings(**cfg, seed=4))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.order, again.order)
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.order, other.order)


def test_random_remasking_is_blind_to_confidence():
    """With the cycle, confidence falls to the right; random order must not: first steps are uniform over positions."""
    first = [
        int((denoised(cycle(), [1], config(gen_length=4, remasking="random", seed=seed)).order == 0).nonzero())
        for seed in range(800)
    ]
    counts = np.bincount(first, minlength=5)[1:]
    assert ((counts - 200) ** 2 / 200).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies_are_softmax(temperature):
    """One masked token after token 1: its distribution is the transition's row, sharpened by the temperature."""
    transition = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 4, dtype=torch.float64)
    predict = MarkovPredictor(torch.full((4,), 0.25), transition)
    n = 3000
    drawn = [
        int(denoised(predict, [1], config(gen_length=1, temperature=temperature, seed=seed)).tokens[1])
        for seed in range(n)
    ]
    expected = n * torch.softmax(transition[0].log() / temperature, 0).numpy()
    counts = np.bincount(drawn, minlength=5)
    assert counts[0] == 0
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


def test_positions_sampled_in_one_step_are_independent():
    predict = MarkovPredictor(torch.full((2,), 0.5), torch.full((2, 2), 0.5))
    cfg = {"steps": 1, "block_length": 2, "gen_length": 2, "temperature": 1.0}
    pairs = Counter(
        tuple(denoised(predict, [1], Settings(**cfg, seed=seed)).tokens[1:].tolist()) for seed in range(1200)
    )
    assert sum((pairs[pair] - 300) ** 2 / 300 for pair in itertools.product((1, 2), repeat=2)) < 16.3


def test_impossible_tokens_are_never_sampled():
    """Probability 0 means never, also next to a cumulative sum's rounding."""
    for seed in range(300):
        tokens = denoised(drift(), [4], config(temperature=1.0, seed=seed, gen_length=4)).tokens
        assert tokens.tolist() == [4] * 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"block_length": 0}, "block_length must be at least 1, found 0"),
        ({"gen_length": -1}, "gen_length must be at least 1, found -1"),
        ({"steps": 5}, "steps 5 exceeds block_length 4"),
        ({"temperature": -0.1}, "temperature .* found -0.1"),
        ({"temperature": float("nan")}, "temperature .* found nan"),
        ({"gen_length": 64.0}, "gen_length must be int, found 64.0"),
        ({"gen_length": None}, "gen_length must be int, found None"),
        ({"steps": True}, "steps must be int, found True"),
        ({"credit": "no"}, "credit must be bool, found 'no'"),
        ({"stop": [1]}, r"stop must be texts, found \(1,\)"),
        ({"remasking": "high"}, "'entropy', found 'high'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_input_errors():
    with pytest.raises(ValueError, match="contains the mask token 0: infill"):
        denoised(cycle(), [1, MASK], config())
    with pytest.raises(ValueError, match=r"one sequence \[s\], found \[1, 2\]"):
        denoised(cycle(), torch.tensor([[1, 2]]), config())
    with pytest.raises(ValueError, match=r"logits \[1, 5, 6\], found \[5, 6\]"):
        denoised(lambda tokens: cycle()(tokens)[0], [1], config())
    with pytest.raises(ValueError, match=r"NaN, .* at step 0"):
        denoised(lambda tokens: cycle()(tokens) * torch.nan, [1], config())
    for settings in (config(remasking="random"), config(remasking="random", temperature=1.0)):
        with pytest.raises(ValueError, match=r"NaN, .* at step 0"):
            denoised(lambda tokens: cycle()(tokens) * torch.nan, [1], settings)
    assert config(stop="ab").stop == ("ab",)
    with pytest.raises(ValueError, match="needs a tokenizer that spells </think>"):
        denoised(cycle(), [1], config(end_think_boost=1.0))
    with pytest.raises(ValueError, match="need a way to decode"):
        denoised(cycle(), [1], config(stop=("x",)))

"""Proportions: exact over every prefix, computed from anywhere, and untouched by what comes later."""

import random
from collections import Counter
from fractions import Fraction

import pytest

from illada_megatron.data.corpus.blend import BlendSchedule, Proportions
from illada_megatron.data.errors import DataError


def _shares(weights: list[float]) -> list[Fraction]:
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def _random_weights(number: int) -> list[float]:
    """Few or many corpora, flat or steep, with short or long periods."""
    rng = random.Random(number)
    steepness, digits = rng.choice([1, 3]), rng.choice([1, 2, 3, 9, 12])
    return [round(rng.random() ** steepness, digits) + 1e-3 for _ in range(rng.randint(1, 12))]


@pytest.mark.parametrize("start", [0, 421_807, 10**9, 12_345_678_901_234])
@pytest.mark.parametrize("number", range(12))
def test_every_prefix_is_exact_to_one_sample(number: int, start: int) -> None:
    """|N_c(n) - n w_c| < 1 for every corpus at every n, in exact arithmetic, across the ends of blocks; and `locate`
    numbers each corpus's samples without a gap, so that none is read twice or skipped."""
    weights = _random_weights(number)
    proportions, shares = Proportions(weights), _shares(weights)
    counts = proportions.counts(start)
    assert sum(counts) == start
    for place in range(start, start + 2 * proportions.block_length + 10):
        assert all(abs(count - place * share) < 1 for count, share in zip(counts, shares, strict=True)), place
        corpus, index = proportions.locate(place)
        assert index == counts[corpus]
        counts[corpus] += 1
    assert counts == proportions.counts(start + 2 * proportions.block_length + 10)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [5, 3, 1, 1], [0.5, 0.25, 0.2, 0.05], [1, 0, 3]])
def test_blocks_of_the_period_hold_each_share_exactly(weights: list[float]) -> None:
    """0.7 and 0.3: 7 and 3 of every ten, wherever a multiple of ten begins."""
    proportions = Proportions(weights)
    for block in range(40):
        places = range(block * proportions.period, (block + 1) * proportions.period)
        counts = Counter(proportions.locate(place)[0] for place in places)
        expected = {c: int(share * proportions.period) for c, share in enumerate(_shares(weights)) if share}
        assert counts == expected


def test_order_is_computed_from_anywhere() -> None:
    """A resumed run asks for sample 10^9 first: the answer must not depend on what was asked before."""
    weights = [0.61803398875, 0.2718281828, 0.1101378712]
    forward = [Proportions(weights).locate(10**9 + i) for i in (0, 5000, 77, 2**20)]
    proportions = Proportions(weights)
    backward = [proportions.locate(10**9 + i) for i in (2**20, 77, 5000, 0)]
    assert forward == backward[::-1]


def test_known_order_does_not_change() -> None:
    """Another order would make a resumed run repeat some windows and miss others."""
    proportions = Proportions([0.5, 0.3, 0.2])
    assert "".join(str(proportions.locate(i)[0]) for i in range(20)) == "01020101020102010102"
    long = Proportions([1.23456789, 3.14159265, 2.71828182])
    assert [long.locate(10**12 + i) for i in range(3)] == [
        (2, 383156516335),
        (1, 442824466052),
        (2, 383156516336),
    ]


def test_phases_change_nothing_before_them() -> None:
    """Annealing added to a run that is under way: the past keeps its samples, each corpus goes on where it was."""
    plain = BlendSchedule([(0, [0.9, 0.1, 0.0])])
    annealed = BlendSchedule([(0, [0.9, 0.1, 0.0]), (1003, [0.2, 0.3, 0.5]), (2500, [0.0, 1.0, 0.0])])
    assert [annealed.locate(i) for i in range(1003)] == [plain.locate(i) for i in range(1003)]
    counts = [0, 0, 0]
    for i in range(4000):
        assert annealed.counts(i) == counts
        corpus, index = annealed.locate(i)
        assert index == counts[corpus]
        counts[corpus] += 1
        for start, stop, weights in ((0, 1003, [0.9, 0.1, 0]), (1003, 2500, [0.2, 0.3, 0.5]), (2500, 4000, [0, 1, 0])):
            if start <= i < stop:
                before = annealed.counts(start)
                errors = [
                    abs(counts[c] - before[c] - (i + 1 - start) * share) for c, share in enumerate(_shares(weights))
                ]
                assert max(errors) < 1
    assert annealed.locate(10**10)[0] == 1


def test_wrong_weights_are_errors() -> None:
    with pytest.raises(DataError, match="no negative and a positive"):
        Proportions([1, -1, 1])
    with pytest.raises(DataError, match="no negative and a positive"):
        Proportions([0, 0])
    with pytest.raises(DataError, match=r"a share of 1e-06, expected at least 1e-05"):
        Proportions([999_999, 1])
    with pytest.raises(DataError, match=r"begin at samples \[5\]"):
        BlendSchedule([(5, [1])])
    with pytest.raises(DataError, match=r"begin at samples \[0, 9, 9\]"):
        BlendSchedule([(0, [1]), (9, [1]), (9, [1])])

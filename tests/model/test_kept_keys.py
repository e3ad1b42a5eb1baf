"""Where keys and values of texts are kept: no two texts share a row, what one has stays while others come and go."""

import random

import pytest
import torch
from torch import Tensor

from illada_megatron.model.kept_keys import KeptKeys


def _written(keys: KeptKeys, text: int, value: float, count: int) -> Tensor:
    """Everything that layer 1 keeps, once `count` tokens of the text are `value`."""
    return keys.write(1, torch.arange(count) + keys.start(text), torch.full((count, 2, 2, 4), value))


def test_a_gap_is_filled_where_it_is_long_enough() -> None:
    keys = KeptKeys()
    for text, capacity in enumerate((10, 5, 10)):
        keys.keep(text, capacity)
    keys.forget(1)
    keys.keep(3, 6)
    keys.keep(4, 4)
    keys.forget(0)
    keys.keep(5, 10)
    assert [keys.start(text) for text in (2, 3, 4, 5)] == [15, 25, 10, 0]


def test_what_is_kept_stays_while_others_come() -> None:
    keys = KeptKeys()
    keys.keep(1, 3)
    _written(keys, 1, 7.0, 3)
    keys.keep(2, 100)
    room = _written(keys, 2, 8.0, 100)
    assert (room[:3] == 7).all()
    assert (room[3:103] == 8).all()


def test_a_text_finds_nothing_of_the_one_that_had_its_rows() -> None:
    keys = KeptKeys()
    for text in (1, 2):
        keys.keep(text, 4)
        _written(keys, text, float(text), 4)
    keys.forget(1)
    keys.keep(3, 4)
    room = _written(keys, 3, 3.0, 1)
    assert room[:, 0, 0, 0].tolist()[:8] == [3, 0, 0, 0, 2, 2, 2, 2]


def test_with_the_last_text_the_memory_goes() -> None:
    keys = KeptKeys()
    keys.keep(1, 1000)
    assert len(_written(keys, 1, 1.0, 3)) >= 1000
    keys.forget(1)
    assert len(keys) == 0
    keys.keep(2, 3)
    assert len(_written(keys, 2, 1.0, 3)) == 3


def test_rows_never_exceed_the_limit_and_nobody_waits_who_has_room() -> None:
    """Texts come and go, as the engine admits them: what each has written stays its own."""
    source, most = random.Random(0), 4096
    keys, live, used, moved = KeptKeys(), dict[int, int](), 0, 0
    for number in range(3000):
        capacity = source.choice([16, 33, 128, 700, 1500])
        while used + capacity > most:
            gone = source.choice(list(live))
            keys.forget(gone)
            used -= live.pop(gone)
        before = {text: keys.start(text) for text in live}
        keys.keep(number, capacity, most)
        moved += any(keys.start(text) != start for text, start in before.items())
        live[number] = capacity
        used += capacity
        room = _written(keys, number, float(number), capacity // 2)
        assert len(room) <= most
        for text, rows in live.items():
            own = room[keys.start(text) : keys.start(text) + rows, 0, 0, 0]
            assert (own[: rows // 2] == text).all()
            assert (own[rows // 2 :] == 0).all()
    assert moved > 100
    with pytest.raises(ValueError, match=f"of 4096 may be: no room for {most}"):
        keys.keep(-1, most, most)

"""The same command in the same layout gives the same bits; with training.deterministic that is promised."""

import pytest
from launch import TrainOnce
from test_layouts import DETERMINISTIC, OVERLAP, SEQUENCE, TP2

pytestmark = pytest.mark.slow
AGAIN = "logging.interval_steps=5"  # nothing that is computed


@pytest.mark.parametrize("mode", [(), (DETERMINISTIC,)], ids=["by default", "deterministic"])
@pytest.mark.parametrize("layout", [(2, *OVERLAP), (4, TP2, SEQUENCE)], ids=["DP2", "TP2 DP2"])
def test_twice_the_same(layout: tuple[int, *tuple[str, ...]], mode: tuple[str, ...], train_once: TrainOnce) -> None:
    first, second = train_once(*layout, *mode), train_once(*layout, *mode, AGAIN)
    for one, other in zip(first.steps, second.steps, strict=True):
        for name in ("loss", "masked_cross_entropy", "grad_norm", "cross_entropy_by_t"):
            assert one[name] == other[name], (one["step"], name)

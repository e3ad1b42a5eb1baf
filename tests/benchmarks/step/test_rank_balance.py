"""The benchmark of ranks' work in miniature, and the schedule that it follows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.step.pipeline_time import one_forward_one_backward


def test_the_command_runs(benchmark: Callable[..., dict[str, Any]]) -> None:
    options = ("--preset", "tiny", "--ranks", 8, "--steps", 2, "--cpu-steps", 1)
    report = benchmark("step.rank_balance", *options)
    assert report["divided"]["range_over_mean"] < report["in_order"]["range_over_mean"]
    assert report["cpu_step_cpu_seconds"] > 0


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (4, 4), (4, 20), (3, 2)])
def test_equal_microbatches_take_what_the_papers_formula_says(stages: int, microbatches: int) -> None:
    """arXiv 2104.04473, section 2.2.1: the bubble is (p - 1) / m of the time without one."""
    time = one_forward_one_backward(np.full((stages, microbatches), 3.0))
    assert time == pytest.approx(3.0 * (microbatches + stages - 1))


def test_a_dear_microbatch_at_the_end_is_waited_for() -> None:
    work = np.ones((4, 8))
    first, middle = work.copy(), work.copy()
    first[:, 0], middle[:, 4] = 2.0, 2.0
    assert one_forward_one_backward(middle) < one_forward_one_backward(first)

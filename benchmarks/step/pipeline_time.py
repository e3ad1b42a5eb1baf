"""How long a pipeline takes for micro-batches that differ: its schedule, followed with given times."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def one_forward_one_backward(work: NDArray[np.float64]) -> float:
    """Time of a step under 1F1B (arXiv 2104.04473, section 2.2.1) in the unit of `work` `[stages, micro-batches]`, a
    third of which is the forward pass; exchanges take none."""
    stages, microbatches = work.shape
    orders = [_order(stages, stage, microbatches) for stage in range(stages)]
    ended: dict[tuple[bool, int, int], float] = {}
    free, done = [0.0] * stages, [0] * stages
    while len(ended) < 2 * stages * microbatches:
        for stage, order in enumerate(orders):
            while done[stage] < len(order):
                forward, number = order[done[stage]]
                neighbour = stage - 1 if forward else stage + 1
                needed = (forward, neighbour, number)
                if 0 <= neighbour < stages and needed not in ended:
                    break
                share = work[stage, number] * (1 if forward else 2) / 3
                free[stage] = max(free[stage], ended.get(needed, 0.0)) + share
                ended[forward, stage, number] = free[stage]
                done[stage] += 1
    return max(free)


def _order(stages: int, stage: int, microbatches: int) -> Sequence[tuple[bool, int]]:
    """(forward?, micro-batch) of a stage, one after the other."""
    ahead = min(stages - 1 - stage, microbatches)
    order = [(True, number) for number in range(ahead)]
    for number in range(microbatches - ahead):
        order += [(True, ahead + number), (False, number)]
    return order + [(False, number) for number in range(microbatches - ahead, microbatches)]

"""Which data-parallel rank takes which samples of a global batch, and in which micro-batches.

In a synchronous step all ranks wait for the one with the most work. Linear layers are the same work for every sample;
the head's grows with its masked tokens, between none and all of them, and attention's with the squares of its segments'
lengths. Every rank computes the same division from the same draws; nothing is sent, and no token is read. A step's sums
are over its samples, so that the losses stay what they are.
"""

import heapq
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from illada_megatron.config import ModelConfig
from illada_megatron.config.layout import Layout
from illada_megatron.diffusion.work import SampleWork
from illada_megatron.training.flops import training_flops

_KEPT = 4
"""Divisions: a loader works on the micro-batches of few steps at a time."""


class Division:
    """The samples of each micro-batch of a step, for any step; called from several threads."""

    def __init__(
        self, work: Callable[[int, int], SampleWork], model: ModelConfig, layout: Layout, micro_batch_size: int
    ) -> None:
        """work: of samples [first, first + count)."""
        self._work, self._model, self._layout, self._size = work, model, layout, micro_batch_size
        self._of_step = lru_cache(maxsize=_KEPT)(self._divide)

    def places(self, first_sample: int, num_samples: int, microbatch: int, rank: int) -> list[int]:
        """`[micro_batch_size]` places of the batch of num_samples samples from first_sample on, ascending. A place p
        from num_samples on has no sample of its own, and repeats p % num_samples without weight."""
        places: list[int] = self._of_step(first_sample, num_samples)[rank, microbatch].tolist()
        return places

    def _divide(self, first_sample: int, num_samples: int) -> NDArray[np.int64]:
        """Places `[ranks, micro-batches, micro_batch_size]`."""
        ranks, size = self._layout.data, self._size
        microbatches = self._layout.microbatches(num_samples, size)
        if ranks == 1 and self._layout.pipeline == 1:  # nobody waits
            return np.arange(microbatches * size).reshape(1, microbatches, size)
        work = self._work(first_sample, num_samples)
        filling = np.arange(num_samples, ranks * microbatches * size) % num_samples
        places = SampleWork(
            np.concatenate([work.masked_tokens, np.zeros(filling.size)]),
            np.concatenate([work.squared_lengths, work.squared_lengths[filling]]),
        )
        pipeline = self._layout.pipeline
        return divide(sample_costs(places, self._model, pipeline), ranks, microbatches, size, pipeline > 1)


def sample_costs(work: SampleWork, model: ModelConfig, pipeline: int) -> NDArray[np.float64]:
    """FLOPs `[n]` by which samples differ, on the stage that has the head: its part of the layers' attention, and the
    head."""
    pair, masked = training_flops(model, 0, 1, 0), training_flops(model, 0, 0, 1)
    return pair / pipeline * work.squared_lengths + masked * work.masked_tokens


def divide(costs: NDArray[np.float64], ranks: int, microbatches: int, size: int, pipelined: bool) -> NDArray[np.int64]:
    """Places of `costs` `[ranks * microbatches * size]` -> `[ranks, microbatches, size]`: ranks cost nearly alike, and
    the micro-batches of a rank, as far as its samples allow.

    pipelined: a rank's cheapest micro-batches come first and last, where a pipeline's other stages wait for one to pass
    through, and the dearest in the middle, beside others that take as long.
    """
    groups = _equal_groups(costs, np.arange(costs.size), ranks)
    if size > 1:
        groups = np.array([_equal_groups(costs, own, microbatches) for own in groups])
    divided = np.sort(groups.reshape(ranks, microbatches, size), axis=-1)
    order = np.argsort(divided[..., 0], axis=-1)
    if pipelined:
        # added exactly: in the last bit numpy's sums may differ between the machines of a pipeline
        sums = [[math.fsum(one) for one in own] for own in costs[divided].tolist()]
        rising = np.argsort(sums, axis=-1, kind="stable")
        order = np.concatenate([rising[:, ::2], rising[:, 1::2][:, ::-1]], axis=1)
    return np.take_along_axis(divided, order[..., None], axis=1)


def _equal_groups(costs: NDArray[np.float64], places: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`[count, places / count]`: groups of equally many places, the dearest place first, into the group that costs
    least so far and has room (Graham's longest processing time, SIAM J. Appl. Math. 17 (1969) 416-429). O(n log n)."""
    room = places.size // count
    largest_first = places[np.argsort(-costs[places], kind="stable")]
    groups: list[list[int]] = [[] for _ in range(count)]
    open_groups = [(0.0, number) for number in range(count)]
    for place, cost in zip(largest_first.tolist(), costs[largest_first].tolist(), strict=True):
        total, number = open_groups[0]
        groups[number].append(place)
        if len(groups[number]) < room:
            heapq.heapreplace(open_groups, (total + cost, number))
        else:
            heapq.heappop(open_groups)
    return np.array(groups)

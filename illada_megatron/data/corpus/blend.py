"""Which corpus of a weighted mixture a sample comes from, and which of that corpus's samples it is.

Let corpus c have the share w_c (they sum to 1), T_c(n) = n w_c, and N_c(n) be its samples among the first n. The order
kept here has N_c(n) in {floor T_c(n), ceil T_c(n)} for every n and c: over any prefix the error is below one sample.
That is the "Pfair" condition of scheduling theory (Baruah, Cohen, Plaxton, Varvel, "Proportionate Progress", 1996): the
j-th sample of c may stand at the places floor(j / w_c) <= place < ceil((j + 1) / w_c), and on one processor the rule
"of the samples whose window is open take the one whose window closes first" (EDF) meets every window.

EDF alone would have to be run from sample 0. So the order is cut into blocks and the counts at block boundaries are
computed without what came before:

- `_nearest(n)`: floor T_c(n) for all, and one more for the corpora whose next window closes first until the sum is n.
  Every window that closes after n can still be met from there (docs/data.md has the proof);
- `counts(b D)`, D the block's length: EDF run from `_nearest((b - 1) D)` over one block. That state can be reached by a
  valid order and continued by one;
- a block runs EDF between the counts at its two ends. As D w_c >= 1, counts never fall, and all windows can be met.

A sample costs a table look-up, the first one of a block O(D log corpora). Nothing is as long as the run. Shares that
are fractions of a small common denominator P (0.7 and 0.3 have P = 10) repeat after P samples: D = P, one table."""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np
from numpy.typing import NDArray

from illada_megatron.data.errors import DataError

_LONGEST_PERIOD = 1 << 16
_SHORTEST_BLOCK = 1 << 10
SMALLEST_SHARE = Fraction(1, 100_000)


@dataclass(frozen=True)
class Block:
    """The samples of a block: corpus [D] uint16, and how many of the block's earlier ones are of that corpus [D]."""

    corpus: NDArray[np.uint16]
    rank: NDArray[np.int32]


class Proportions:
    """An endless order of corpora 0..k-1 in fixed proportions, computed from any place on.

    weights: not negative, any scale, at least one positive; floats are taken as the decimals they print as.

    Raises DataError for weights that are negative, all zero, or below 1e-5 of the sum."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.num_corpora = len(weights)
        exact = [Fraction(str(weight)) for weight in weights]
        total = sum(exact, Fraction(0))
        if total <= 0 or min(exact) < 0:
            raise DataError(f"the weights of a blend are {list(weights)}, expected no negative and a positive one")
        self.shares = [weight / total for weight in exact]
        smallest = min(share for share in self.shares if share)
        if smallest < SMALLEST_SHARE:
            raise DataError(
                f"the weights of a blend are {list(weights)}: the smallest is a share of {float(smallest):.2g}, "
                f"expected at least {float(SMALLEST_SHARE)} of the samples, or 0: raise it or leave that corpus out"
            )
        # share of c = numerators[c] / period, exactly
        self.period = lcm(*(share.denominator for share in self.shares))
        self._numerators = [int(share * self.period) for share in self.shares]
        self._active = [c for c, numerator in enumerate(self._numerators) if numerator]
        self.block_length = self._block_length(smallest)
        self._boundary_counts = lru_cache(maxsize=8)(self._compute_boundary_counts)
        self._block = lru_cache(maxsize=4)(self._compute_block)

    def locate(self, place: int) -> tuple[int, int]:
        """(corpus of the sample at `place` >= 0, how many samples of that corpus come before it)."""
        number, offset = divmod(place, self.block_length)
        block = self._block(0 if self._repeats else number)
        corpus = int(block.corpus[offset])
        return corpus, self._boundary_counts(number)[corpus] + int(block.rank[offset])

    def counts(self, places: int) -> list[int]:
        """Samples of each corpus among the first `places`."""
        number, offset = divmod(places, self.block_length)
        block = self._block(0 if self._repeats else number)
        inside = np.bincount(block.corpus[:offset], minlength=self.num_corpora)
        return [before + int(more) for before, more in zip(self._boundary_counts(number), inside, strict=True)]

    def _block_length(self, smallest: Fraction) -> int:
        self._repeats = self.period <= _LONGEST_PERIOD
        if self._repeats:
            return self.period * -(-_SHORTEST_BLOCK // self.period)
        return max(-(-smallest.denominator // smallest.numerator), _SHORTEST_BLOCK)

    def _compute_boundary_counts(self, number: int) -> tuple[int, ...]:
        place = number * self.block_length
        if place % self.period == 0:
            return tuple(place // self.period * numerator for numerator in self._numerators)
        before = place - self.block_length
        counts = self._nearest(before)
        for corpus in self._earliest_deadline_first(counts, before, place, None):
            counts[corpus] += 1
        return tuple(counts)

    def _compute_block(self, number: int) -> Block:
        start = number * self.block_length
        counts, end = list(self._boundary_counts(number)), self._boundary_counts(number + 1)
        order = self._earliest_deadline_first(counts, start, start + self.block_length, end)
        corpus = np.array(order, dtype=np.uint16)
        rank = np.empty(len(order), dtype=np.int32)
        for c in self._active:
            mine = np.flatnonzero(corpus == c)
            rank[mine] = np.arange(len(mine), dtype=np.int32)
        return Block(corpus, rank)

    def _release(self, corpus: int, j: int) -> int:
        return j * self.period // self._numerators[corpus]

    def _deadline(self, corpus: int, j: int) -> int:
        return -(-(j + 1) * self.period // self._numerators[corpus])

    def _nearest(self, place: int) -> list[int]:
        counts = [place * numerator // self.period for numerator in self._numerators]
        # a share that is whole at `place` has no open window there
        open_windows = [
            (self._deadline(c, counts[c]), c) for c in self._active if place * self._numerators[c] % self.period
        ]
        for _, corpus in sorted(open_windows)[: place - sum(counts)]:
            counts[corpus] += 1
        return counts

    def _earliest_deadline_first(
        self, counts: Sequence[int], start: int, stop: int, end_counts: Sequence[int] | None
    ) -> list[int]:
        """Corpora of the places start..stop-1 after `counts`; with `end_counts` the order ends exactly there."""
        waiting = [(self._release(c, counts[c]), c) for c in self._active]
        heapq.heapify(waiting)
        following = list(counts)
        ready: list[tuple[int, int]] = []
        order = []
        for place in range(start, stop):
            while waiting and waiting[0][0] <= place:
                _, c = heapq.heappop(waiting)
                if end_counts is None:
                    heapq.heappush(ready, (self._deadline(c, following[c]), c))
                elif following[c] < end_counts[c]:
                    heapq.heappush(ready, (min(self._deadline(c, following[c]), stop), c))
            _, c = heapq.heappop(ready)
            order.append(c)
            following[c] += 1
            heapq.heappush(waiting, (self._release(c, following[c]), c))
        return order


class BlendSchedule:
    """Proportions that change at given samples, as annealing phases do. What lies before a change is not touched by it.

    Each phase keeps its proportions from its own first sample on: over any prefix of a phase the error is below one
    sample per corpus. A corpus goes on in each phase where it stopped in the one before.

    phases: (first sample, weights) in ascending order, the first at 0.
    Raises DataError as `Proportions`, and when the phases do not ascend from 0."""

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]]) -> None:
        starts = [start for start, _ in phases]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise DataError(f"the phases of a blend begin at samples {starts}, expected 0 and then ascending numbers")
        self.starts = starts
        self.proportions = [Proportions(weights) for _, weights in phases]
        # samples of each corpus before each phase
        self._before = [[0] * self.proportions[0].num_corpora]
        for phase, (start, stop) in enumerate(itertools.pairwise(starts)):
            gained = self.proportions[phase].counts(stop - start)
            self._before.append([sum(pair) for pair in zip(self._before[-1], gained, strict=True)])

    def locate(self, sample_index: int) -> tuple[int, int]:
        """(corpus, index among that corpus's samples) of a sample."""
        phase = self._phase(sample_index)
        corpus, index = self.proportions[phase].locate(sample_index - self.starts[phase])
        return corpus, self._before[phase][corpus] + index

    def counts(self, num_samples: int) -> list[int]:
        """Samples of each corpus among the first `num_samples`."""
        phase = self._phase(num_samples)
        inside = self.proportions[phase].counts(num_samples - self.starts[phase])
        return [sum(pair) for pair in zip(self._before[phase], inside, strict=True)]

    def _phase(self, sample_index: int) -> int:
        return next(p for p in reversed(range(len(self.starts))) if sample_index >= self.starts[p])

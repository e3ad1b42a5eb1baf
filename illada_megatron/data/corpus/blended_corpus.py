"""Several corpora as one, in the proportions of a `BlendSchedule`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from illada_megatron.data.corpus.blend import BlendSchedule
from illada_megatron.data.corpus.corpus import Corpus, Origin


class BlendedCorpus:
    """Sample i is sample j of corpus c, (c, j) = schedule.locate(i). The interface of `Corpus`; one makes a blend too.

    corpora: all with one sequence_length, in the order of the schedule's weights.
    warnings: what the user should know of them.
    samples_per_window: so many consecutive samples are the same window (complementary masks): sample i is what sample
        i // samples_per_window would be."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        schedule: BlendSchedule,
        warnings: Sequence[str] = (),
        samples_per_window: int = 1,
    ) -> None:
        self.corpora = tuple(corpora)
        self.schedule = schedule
        self.warnings = tuple(warnings)
        self.samples_per_window = samples_per_window
        self.sequence_length = corpora[0].sequence_length
        self.num_tokens = sum(corpus.num_tokens for corpus in corpora)

    def __getitem__(self, sample_index: int) -> NDArray[np.int64]:
        """Tokens of a sample: int64 [sequence_length]."""
        corpus, index = self._locate(sample_index)
        return corpus[index]

    def read(self, sample_indices: Sequence[int], out: NDArray[Any]) -> None:
        """Write the tokens of the samples into the rows of `out` [b, sequence_length], int64 or int32, C-contiguous."""
        if len(self.corpora) == 1:
            self.corpora[0].read([self._locate(index)[1] for index in sample_indices], out)
            return
        for row, sample_index in enumerate(sample_indices):
            corpus, index = self._locate(sample_index)
            corpus.read([index], out[row : row + 1])

    def document_starts(self, sample_index: int) -> NDArray[np.int64]:
        """Positions in (0, sequence_length) of a sample at which documents begin, ascending."""
        corpus, index = self._locate(sample_index)
        return corpus.document_starts(index)

    def origin(self, sample_index: int) -> Origin:
        """Where a sample comes from."""
        corpus, index = self._locate(sample_index)
        return corpus.origin(index)

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each corpus was read when the first `num_samples` have been, by name."""
        num_samples = -(-num_samples // self.samples_per_window)
        counts = [num_samples] if len(self.corpora) == 1 else self.schedule.counts(num_samples)
        return {corpus.name: count / corpus.num_windows for corpus, count in zip(self.corpora, counts, strict=True)}

    def _locate(self, sample_index: int) -> tuple[Corpus, int]:
        sample_index //= self.samples_per_window
        if len(self.corpora) == 1:
            return self.corpora[0], sample_index
        corpus, index = self.schedule.locate(int(sample_index))
        return self.corpora[corpus], index

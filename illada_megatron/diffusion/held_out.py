"""The noise of the held-out bound: a process of its own, whatever training's is, so that two figures differ by the
model alone: the same windows and masks for every checkpoint, layout and training configuration.

Of each text N windows of L tokens are looked at. Sample k of the text is window floor((k n + r) / N) of its n, with one
r, uniform on 0..n-1: each window is as likely as any other, they are spread over the whole of the text, and none comes
twice where N <= n. Its time is t = (pi(k) + u) / N, pi a random permutation of 0..N-1: one sample in every
[j/N, (j+1)/N). K = ceil(t L) of its positions are masked, every set of K alike, and the loss of a masked token weighs
L / K. K is uniform on 1..L, so that the mean of the samples' losses is an unbiased estimate of the bound (arXiv
2502.09992, equation 6). The whole window attends to itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.corpus.order import derive_key, permute
from illada_megatron.data.errors import DataError
from illada_megatron.diffusion.batch import MaskedBatch
from illada_megatron.diffusion.noise import uniforms, words

_TEXT_BITS = 40
"""The index of a draw: the text's number and, in so many low bits, the sample's. Another text changes none of them."""


@dataclass(frozen=True)
class HeldOutSamples:
    """`num_samples` samples of each of `corpora`, all of one sequence length. Sample i is number i % num_samples of
    text i // num_samples; what it is depends on (seed, text, num_samples, i) alone, and costs O(1)."""

    corpora: Sequence[Corpus]
    num_samples: int
    seed: int
    mask_token_id: int

    @property
    def sequence_length(self) -> int:
        return self.corpora[0].sequence_length

    def __len__(self) -> int:
        return len(self.corpora) * self.num_samples

    def window(self, index: int) -> tuple[Corpus, int]:
        """A sample's text, and which window of it."""
        text, number = divmod(index, self.num_samples)
        corpus = self.corpora[text]
        (random_bits,) = words(self.seed, "held_out.window", text, 1).tolist()
        first = random_bits * corpus.num_windows >> 64
        return corpus, (number * corpus.num_windows + first) // self.num_samples

    def t(self, index: int) -> float:
        """A sample's diffusion time."""
        text, number = divmod(index, self.num_samples)
        stratum = permute(number, self.num_samples, derive_key(self.seed, "held_out.t", text))
        return (stratum + float(uniforms(self.seed, "held_out.t", self._draw(index), 1)[0])) / self.num_samples

    def masked(self, index: int) -> NDArray[np.int64]:
        """A sample's masked positions `[K]`, in no order."""
        length = self.sequence_length
        count = min(max(1, math.ceil(self.t(index) * length)), length)
        # the places of the smallest of i.i.d. words are a uniformly chosen set of positions
        draws = words(self.seed, "held_out.mask", self._draw(index), length)
        return np.argpartition(draws, count - 1)[:count]

    def batch(self, indices: Sequence[int]) -> MaskedBatch:
        """Samples `[b]` as a batch. Raises DataError for a window that contains the mask token."""
        labels = np.empty((len(indices), self.sequence_length), np.int64)
        loss_weight = np.zeros(labels.shape, np.float32)
        for row, index in enumerate(indices):
            corpus, window = self.window(index)
            corpus.read([window], labels[row : row + 1])
            if (found := np.flatnonzero(labels[row] == self.mask_token_id)).size:
                text = f"the held-out text {corpus.name}".rstrip()
                raise DataError(
                    f"window {window} of {text} contains the mask token {self.mask_token_id} at position {found[0]} "
                    f"({found.size} in all): the tokenizer must not produce it, or mask_token_id names the wrong token"
                )
            masked = self.masked(index)
            loss_weight[row, masked] = self.sequence_length / masked.size
        cu_seqlens, max_seqlen = self.segments(indices)
        return MaskedBatch(
            tokens=torch.from_numpy(np.where(loss_weight > 0, self.mask_token_id, labels)),
            labels=torch.from_numpy(labels),
            loss_weight=torch.from_numpy(loss_weight),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            t=torch.tensor([self.t(index) for index in indices], dtype=torch.float32),
            sample_index=torch.tensor(list(indices), dtype=torch.int64),
        )

    def segments(self, indices: Sequence[int]) -> tuple[Tensor, int]:
        """`cu_seqlens` `[b + 1]` int32 of their batch, and the longest segment: a window each."""
        length = self.sequence_length
        return torch.arange(len(indices) + 1, dtype=torch.int32) * length, length

    def _draw(self, index: int) -> int:
        text, number = divmod(index, self.num_samples)
        return (text << _TEXT_BITS) + number

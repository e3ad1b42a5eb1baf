"""From clean sequences to what a training step consumes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.data.errors import DataError
from illada_megatron.diffusion.masking import sample_masks
from illada_megatron.diffusion.segments import Boundary, Documents, cumulate_segments, sample_boundary, sample_spans
from illada_megatron.diffusion.weights import LOSS_WEIGHTS


class Corpus(Documents, Protocol):
    """Clean sequences of one length by sample index."""

    def read(self, sample_indices: Sequence[int], out: NDArray[np.int64], /) -> None:
        """Write the token ids of the samples into the rows of `out` `[b, s]`."""


@dataclass(frozen=True)
class MaskedBatch:
    """Labels are not shifted: position i of `tokens` predicts `labels[i]`.

    The loss of a batch is `sum(loss_weight * CE) / (b * s)` nats per token.
    """

    tokens: Tensor  # [b, s] int64, noisy: mask_token_id at masked positions
    labels: Tensor  # [b, s] int64, clean
    loss_weight: Tensor  # [b, s] float32, at masked positions 1/p (or another, `config.loss_weight`), 0 elsewhere
    cu_seqlens: Tensor  # [n+1] int32, offsets of the segments in the flattened b*s tokens
    max_seqlen: int  # length of the longest segment
    t: Tensor  # [b] float32, diffusion time, of the first segment where each has its own
    sample_index: Tensor  # [b] int64
    bound_weight: Tensor | None = None  # [b, s] float32, the weight of the bound; None: loss_weight is it
    segment_t: Tensor | None = None  # [n] float32, times of the segments; None: those of their sequences


def make_masked_batch(
    corpus: Corpus, sample_indices: Sequence[int], config: DiffusionConfig, mask_token_id: int, seed: int
) -> MaskedBatch:
    """Read, cut and mask the samples of one micro-batch.

    A sample's noise depends on (seed, sample index) alone: not on the batch it is in, the rank or what was drawn
    before. Both segments of a split sequence share one t, as LLaDA draws it, unless `config.t_per` says otherwise. With
    complementary masks the corpus has to give samples 2k and 2k+1 the same tokens (`config.samples_per_window`).

    Args:
        corpus: read once.
        sample_indices: `b` global sample indices, in any order.
        config: the noising process.
        mask_token_id: written at masked positions.
        seed: the run's seed.

    Raises:
        ValueError: no index.
        DataError: a clean sequence that already contains the mask token (the model could not tell it from noise, and
            its label would teach it to predict masks).
    """
    if len(sample_indices) == 0:
        raise ValueError("a batch needs at least one sample index, found none")
    b, s = len(sample_indices), corpus.sequence_length
    labels = np.empty((b, s), np.int64)
    corpus.read(sample_indices, labels)
    _refuse_masks(labels, sample_indices, mask_token_id)
    loss_weight = np.zeros((b, s), np.float32)
    bound_weight = np.zeros((b, s), np.float32) if config.loss_weight != "bound" else None
    times = np.empty(b, np.float32)
    segment_times: list[float] = []
    boundaries: list[Boundary] = []
    weigh = LOSS_WEIGHTS[config.loss_weight]
    for row, index in enumerate(sample_indices):
        boundary = sample_boundary(index, corpus, config, seed)
        lengths, of_spans = sample_spans(index, boundary, config, seed)
        # 1 unless truncated: the sequence then counts as the mean over its own tokens
        scale = s / boundary.noised_tokens
        for span in sample_masks(index, lengths, of_spans, config, seed):
            loss_weight[row, span.tokens][span.positions] = weigh(span.bound_weight, span.p, config) * scale
            if bound_weight is not None:
                bound_weight[row, span.tokens][span.positions] = span.bound_weight * scale
        times[row] = of_spans[0]
        segment_times += of_spans if len(of_spans) > 1 else of_spans * len(boundary.segment_tokens)
        boundaries.append(boundary)
    tokens = np.where(loss_weight > 0, mask_token_id, labels)
    cu_seqlens, max_seqlen = cumulate_segments(boundaries)
    return MaskedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_weight=torch.from_numpy(loss_weight),
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        t=torch.from_numpy(times),
        sample_index=torch.tensor([int(index) for index in sample_indices], dtype=torch.int64),
        bound_weight=None if bound_weight is None else torch.from_numpy(bound_weight),
        segment_t=torch.tensor(segment_times, dtype=torch.float32) if config.t_per == "segment" else None,
    )


def _refuse_masks(labels: NDArray[np.int64], sample_indices: Sequence[int], mask_token_id: int) -> None:
    """`labels` `[b, s]` are clean: none of them is the mask."""
    rows, positions = np.nonzero(labels == mask_token_id)
    if rows.size:
        raise DataError(
            f"sample {sample_indices[rows[0]]} contains the mask token {mask_token_id} at position {positions[0]} "
            f"({np.count_nonzero(rows == rows[0])} in all), expected none in text: set "
            "model.mask_token_id to the mask of the tokenizer that made the corpus; `illada tokenizer add-mask` gives "
            "one to a tokenizer that has none"
        )

"""Where a sequence is cut into segments that do not attend to each other. Known without reading a token."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion.noise import uniforms
from illada_megatron.diffusion.schedule import pair_of, sample_times


class Documents(Protocol):
    """Where documents begin in the sequences of a corpus."""

    @property
    def sequence_length(self) -> int: ...

    def document_starts(self, sample_index: int, /) -> NDArray[np.int64]:
        """Positions in (0, s), ascending."""


class Boundary(NamedTuple):
    """A sequence's segments. Tokens from `noised_tokens` on are neither masked nor counted in the loss."""

    segment_tokens: tuple[int, ...]  # lengths of the segments; they sum to the sequence length
    noised_tokens: int


def sample_boundary(sample_index: int, corpus: Documents, config: DiffusionConfig, seed: int) -> Boundary:
    """The segments of a sample.

    - split (arXiv 2606.25331): with `split_probability` two segments, the cut uniform on 1..s-1;
    - document: one segment a document, or part of one, in the sequence;
    - truncate (arXiv 2502.09992): with `truncate_probability` only the first l tokens count, l uniform on 1..s. Shapes
      stay fixed, so the tail remains as a segment of its own that nothing in the head sees;
    - none: one segment.
    """
    s = corpus.sequence_length
    whole = Boundary((s,), s)
    if config.attention_boundary == "none":
        return whole
    if config.attention_boundary == "document":
        edges = [0, *corpus.document_starts(sample_index).tolist(), s]
        return Boundary(tuple(np.diff(edges).tolist()), s)
    happens, where = uniforms(seed, "diffusion.boundary", pair_of(sample_index, config)[0], 2)
    if config.attention_boundary == "split":
        if s < 2 or happens >= config.split_probability:
            return whole
        cut = 1 + int(where * (s - 1))
        return Boundary((cut, s - cut), s)
    head = 1 + int(where * s)
    if head == s or happens >= config.truncate_probability:
        return whole
    return Boundary((head, s - head), head)


def sample_spans(
    sample_index: int, boundary: Boundary, config: DiffusionConfig, seed: int
) -> tuple[tuple[int, ...], list[float]]:
    """Lengths of the runs of noised tokens that share one t, and their times: the whole sequence, or its segments."""
    segments = boundary.segment_tokens
    if config.t_per == "sequence" or len(segments) == 1:
        lengths: tuple[int, ...] = (boundary.noised_tokens,)
    elif boundary.noised_tokens < sum(segments):  # truncated: the tail is not noised
        lengths = segments[:1]
    else:
        lengths = segments
    return lengths, sample_times(sample_index, len(lengths), config, seed)


def make_segments(
    sample_indices: Sequence[int], corpus: Documents, config: DiffusionConfig, seed: int
) -> tuple[Tensor, int]:
    """`cu_seqlens` `[n+1]` int32 over the flattened `b*s` tokens and the longest segment, as in `make_masked_batch`.

    It is all that a pipeline stage without embedding and head needs of a batch; no token is read.
    """
    boundaries = [sample_boundary(index, corpus, config, seed) for index in sample_indices]
    return cumulate_segments(boundaries)


def cumulate_segments(boundaries: Sequence[Boundary]) -> tuple[Tensor, int]:
    """Cumulative offsets `[n+1]` int32 of all segments in order, and the length of the longest."""
    lengths = [tokens for boundary in boundaries for tokens in boundary.segment_tokens]
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths), 0, dtype=torch.int32, out=offsets[1:])
    return offsets, max(lengths)

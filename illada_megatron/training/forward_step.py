"""Micro-batches for a pipeline stage, and the forward step that megatron-core's schedules call."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from megatron.core import parallel_state
from torch import Tensor

from illada_megatron.config import RunConfig
from illada_megatron.config.layout import row_multiple, row_tokens
from illada_megatron.data.corpus.blended_corpus import BlendedCorpus
from illada_megatron.data.corpus.prefetch import Prefetcher
from illada_megatron.diffusion import MaskedBatch, make_masked_batch, make_segments, sample_t
from illada_megatron.diffusion.context import ContextShare, context_share
from illada_megatron.diffusion.work import SampleWork, work_of_samples
from illada_megatron.model.embedding import TokenRows
from illada_megatron.model.packing import Segments, pack
from illada_megatron.ops.masked_linear_cross_entropy import MaskedLoss
from illada_megatron.ops.masked_rows import MaskedRows
from illada_megatron.ops.tensor_fields import pinned
from illada_megatron.runtime import Runtime
from illada_megatron.runtime.spans import span
from illada_megatron.training.division import Division


@dataclass(frozen=True)
class BatchSlice:
    """Micro-batch number `microbatch` of the global batch [first_sample, first_sample + num_samples)."""

    first_sample: int
    num_samples: int
    microbatch: int


@dataclass(frozen=True)
class Microbatch:
    """What a stage needs of a micro-batch: a middle stage only its segments. All that a GPU would have to be asked for
    was found on the CPU, by the loader."""

    cu_seqlens: Tensor
    """[n + 1] int32, offsets of the segments in the packed row."""
    max_seqlen: int
    lengths: list[int]
    """[n], of the segments."""
    batch: MaskedBatch | None
    counted: int
    """Its first samples, which count; those behind them fill the step up."""
    masked: MaskedRows | None
    """The last stage's."""
    token_rows: TokenRows | None
    """The first stage's."""
    share: ContextShare | None = None
    """What this context-parallel rank has of it, and what `masked` and `token_rows` are of; None: all."""

    def segments(self) -> Segments:
        """For the layers."""
        if self.share is None:
            return pack(self.cu_seqlens, self.max_seqlen, self.lengths)
        return pack(self.cu_seqlens, self.share.max_seqlen, self.lengths, self.share.cu_seqlens_padded)


class SampleMaker(Protocol):
    """Masked samples as a pure function of their index."""

    def batch(self, indices: Sequence[int], /) -> MaskedBatch:
        """The samples `[b]` as a batch."""

    def segments(self, indices: Sequence[int], /) -> tuple[Tensor, int]:
        """Of that batch `cu_seqlens` `[n + 1]` and the longest segment, without a token being read."""


@dataclass(frozen=True)
class TrainingSamples:
    """The run's: corpus and noise as they are configured."""

    corpus: BlendedCorpus
    config: RunConfig
    seed: int

    def batch(self, indices: Sequence[int]) -> MaskedBatch:
        config = self.config
        return make_masked_batch(self.corpus, indices, config.diffusion, config.model.mask_token_id, self.seed)

    def segments(self, indices: Sequence[int]) -> tuple[Tensor, int]:
        return make_segments(indices, self.corpus, self.config.diffusion, self.seed)

    def work(self, first_sample: int, num_samples: int) -> SampleWork:
        """How much work the samples of a range are."""
        diffusion = self.config.diffusion
        return work_of_samples(first_sample, num_samples, self.corpus.sequence_length, diffusion, self.seed)

    def times(self, first_sample: int, num_samples: int) -> list[float]:
        """The diffusion time t of each sample of a range, drawn again: nothing is kept or sent."""
        samples = range(first_sample, first_sample + num_samples)
        return [sample_t(sample, self.config.diffusion, self.seed) for sample in samples]


Maker = TypeVar("Maker", bound=SampleMaker)


@dataclass(frozen=True)
class BatchSource(Generic[Maker]):
    """Builds micro-batches as pure functions of sample indices. Each rank has its own; nothing is sent between them."""

    maker: Maker
    config: RunConfig
    runtime: Runtime
    division: Division | None = None
    """None: micro-batch m of rank r takes the r-th run of micro_batch_size samples of the m-th slice."""

    def prefetch(self, slices: Iterable[BatchSlice]) -> Prefetcher[BatchSlice, Microbatch]:
        """This data-parallel rank's micro-batches of `slices`, in their order, built ahead by threads, in host memory.

        Places beyond num_samples repeat earlier samples with loss weight 0 (batches that the layout does not divide).
        """
        data = self.config.data
        return Prefetcher(self._build, iter(slices), data.loader_threads, data.prefetch_microbatches)

    def samples(self, part: BatchSlice) -> list[int]:
        """Sample indices of this data-parallel rank's micro-batch of a slice."""
        return [part.first_sample + one % part.num_samples for one in self._places(part)]

    def _places(self, part: BatchSlice) -> Sequence[int]:
        rank = self.runtime.data_parallel_rank
        if self.division is not None:
            return self.division.places(part.first_sample, part.num_samples, part.microbatch, rank)
        size = self.config.training.micro_batch_size
        first = (part.microbatch * self.runtime.layout.data + rank) * size
        return range(first, first + size)

    def _build(self, part: BatchSlice) -> Microbatch:
        run, indices = self.runtime, self.samples(part)
        counted = sum(one < part.num_samples for one in self._places(part))
        batch = masked = rows = None
        if run.is_first_stage or run.is_last_stage:
            batch = self.maker.batch(indices)
            batch.loss_weight[counted:] = 0.0
            cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen
        else:
            cu_seqlens, longest = self.maker.segments(indices)
        share = self._share(cu_seqlens, batch)
        if batch is not None:
            row = batch if share is None else share
            masked = self._masked_rows(row.loss_weight.view(-1)) if run.is_last_stage else None
            rows = self._token_rows(row.tokens.view(-1)) if run.is_first_stage else None
        lengths = cu_seqlens.diff().tolist()
        built = Microbatch(cu_seqlens, longest, lengths, batch, counted, masked, rows, share)
        return pinned(built) if run.device.is_cuda else built

    def _masked_rows(self, loss_weight: Tensor) -> MaskedRows:
        group = parallel_state.get_tensor_model_parallel_group()
        return MaskedRows.locate(loss_weight, group, self.config.parallel.sequence_parallel)

    def _token_rows(self, tokens: Tensor) -> TokenRows:
        model, tensor = self.config.model, self.runtime.layout.tensor
        count = model.padded_vocab_size // tensor
        first = parallel_state.get_tensor_model_parallel_rank() * count
        return TokenRows.locate(tokens, range(first, first + count), model.mask_token_id)

    def _share(self, cu_seqlens: Tensor, batch: MaskedBatch | None) -> ContextShare | None:
        """This context-parallel rank's. batch: None for a middle stage."""
        ranks, rank = self.runtime.layout.context, self.runtime.context_parallel_rank
        if ranks == 1:
            return None
        row, multiple = row_tokens(self.config), row_multiple(self.config)
        return context_share(cu_seqlens, batch, rank, ranks, row, multiple)


Sums = Callable[[MaskedLoss, MaskedBatch, int], Tensor]
"""What is kept of a micro-batch: of (its loss, the batch, how many of its first samples count)."""


def forward_step(
    num_microbatches: int, tokens: float, sums: Sums, microbatches: Iterator[Microbatch], model: torch.nn.Module
) -> tuple[Tensor | MaskedLoss, Callable[..., Any]]:
    """One stage's forward pass: (output, function of the loss). With the first three bound, it has the signature of
    megatron-core's schedules.

    num_microbatches: of a rank's step; tokens: those of the global batch by the micro-batches of all ranks, which is
    what a micro-batch has, or less where the last ones are filled up; sums: what is to be kept of each.
    """
    with span("wait for a micro-batch"):
        microbatch = next(microbatches)
    batch, share, segments = microbatch.batch, microbatch.share, microbatch.segments()
    with span("forward pass of a micro-batch"):
        if batch is None:
            return model(None, segments), _no_loss
        row = batch if share is None else share
        ranks = 1 if share is None else share.ranks
        output = model(
            row.tokens.view(1, -1),
            segments,
            labels=row.labels.view(-1),
            loss_weight=row.loss_weight.view(-1),
            grad_scale=ranks / (tokens * num_microbatches),  # what the schedule, and `_loss`, make of the loss
            masked=microbatch.masked,
            token_rows=microbatch.token_rows,
        )
    return output, partial(_loss, batch, share, microbatch.counted, tokens, sums)


def _loss(
    batch: MaskedBatch, share: ContextShare | None, counted: int, tokens: float, sums: Sums, output: MaskedLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of the micro-batch in nats/token, what is kept of it).

    The schedule divides by the number of micro-batches and multiplies by that of the context-parallel ranks, and DDP
    averages over these and data parallel, which makes it sum(weight * CE) / (tokens of the global batch), once.
    """
    if share is not None:  # what is kept is told by places in the whole batch
        output = output._replace(rows=share.positions[output.rows])
    return output.loss_sum / tokens, {"sums": sums(output, batch, counted)}


def _no_loss(_: Any) -> Any:
    raise RuntimeError("a middle stage has no loss; megatron-core's schedule took it for the last one")

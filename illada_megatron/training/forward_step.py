"""Micro-batches for a pipeline stage, and the forward step that megatron-core's schedules call."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from illada_megatron.config import RunConfig
from illada_megatron.data.corpus.blended_corpus import BlendedCorpus
from illada_megatron.data.corpus.prefetch import Prefetcher
from illada_megatron.diffusion import MaskedBatch, make_masked_batch, make_segments, sample_t
from illada_megatron.model.packing import pack
from illada_megatron.ops.masked_linear_cross_entropy import MaskedLoss
from illada_megatron.runtime import Runtime
from illada_megatron.runtime.spans import span


@dataclass(frozen=True)
class BatchSlice:
    """Micro-batch number `microbatch` of the global batch [first_sample, first_sample + num_samples)."""

    first_sample: int
    num_samples: int
    microbatch: int


@dataclass(frozen=True)
class Microbatch:
    """What a stage needs of a micro-batch: a middle stage only its segments."""

    cu_seqlens: Tensor
    """[n + 1] int32, offsets of the segments in the packed row."""
    max_seqlen: int
    batch: MaskedBatch | None
    counted: int
    """Its first samples, which count; those behind them fill the step up."""

    def to(self, device: torch.device) -> "Microbatch":
        """The same on `device`; from pinned memory the copy overlaps with what the device is doing."""
        batch = None if self.batch is None else self.batch.to(device, non_blocking=True)
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=True), batch=batch)


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

    def prefetch(self, slices: Iterable[BatchSlice]) -> Prefetcher[BatchSlice, Microbatch]:
        """This data-parallel rank's micro-batches of `slices`, in their order, built ahead by threads, in host memory.

        Micro-batch m of rank r takes the r-th run of micro_batch_size samples of the m-th slice. Slots beyond
        num_samples repeat earlier samples with loss weight 0 (batches that the layout does not divide).
        """
        data = self.config.data
        return Prefetcher(self._build, iter(slices), data.loader_threads, data.prefetch_microbatches)

    def samples(self, part: BatchSlice) -> list[int]:
        """Sample indices of this data-parallel rank's micro-batch of a slice."""
        return [part.first_sample + one % part.num_samples for one in self._slots(part)]

    def _slots(self, part: BatchSlice) -> range:
        size, ranks = self.config.training.micro_batch_size, self.runtime.layout.data
        slot = (part.microbatch * ranks + self.runtime.data_parallel_rank) * size
        return range(slot, slot + size)

    def _build(self, part: BatchSlice) -> Microbatch:
        slots, indices = self._slots(part), self.samples(part)
        pinned = self.runtime.device.is_cuda
        counted = sum(one < part.num_samples for one in slots)
        if not (self.runtime.is_first_stage or self.runtime.is_last_stage):
            cu_seqlens, longest = self.maker.segments(indices)
            return Microbatch(cu_seqlens.pin_memory() if pinned else cu_seqlens, longest, None, counted)
        batch = self.maker.batch(indices)
        batch.loss_weight[counted:] = 0.0
        batch = batch.pin_memory() if pinned else batch
        return Microbatch(batch.cu_seqlens, batch.max_seqlen, batch, counted)


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
    batch, segments = microbatch.batch, pack(microbatch.cu_seqlens, microbatch.max_seqlen)
    with span("forward pass of a micro-batch"):
        if batch is None:
            return model(None, segments), _no_loss
        output = model(
            batch.tokens.view(1, -1),
            segments,
            labels=batch.labels.view(-1),
            loss_weight=batch.loss_weight.view(-1),
            grad_scale=1 / (tokens * num_microbatches),  # what `_loss` and the schedule divide by
        )
    return output, partial(_loss, batch, microbatch.counted, tokens, sums)


def _loss(
    batch: MaskedBatch, counted: int, tokens: float, sums: Sums, output: MaskedLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of the micro-batch in nats/token, what is kept of it).

    The schedule divides by the number of micro-batches and DDP averages over data parallel, which makes it
    sum(weight * CE) / (tokens of the global batch), once.
    """
    return output.loss_sum / tokens, {"sums": sums(output, batch, counted)}


def _no_loss(_: Any) -> Any:
    raise RuntimeError("a middle stage has no loss; megatron-core's schedule took it for the last one")

"""Micro-batches for a pipeline stage, and the forward step that megatron-core's schedules call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from illada_megatron.config import RunConfig
from illada_megatron.data.corpus import Corpus
from illada_megatron.diffusion import MaskedBatch, make_masked_batch, make_segments
from illada_megatron.model.packing import pack
from illada_megatron.ops.masked_linear_cross_entropy import MaskedLoss
from illada_megatron.runtime import Runtime
from illada_megatron.training.metrics import microbatch_sums


@dataclass(frozen=True)
class Microbatch:
    """What a stage needs of a micro-batch: a middle stage only its segments."""

    segments: PackedSeqParams
    batch: MaskedBatch | None


@dataclass(frozen=True)
class BatchSource:
    """Builds micro-batches as pure functions of sample indices. Each rank has its own; nothing is sent between them."""

    corpus: Corpus
    config: RunConfig
    runtime: Runtime
    noise_seed: int

    def microbatches(self, first_sample: int, num_samples: int, num_microbatches: int) -> Iterator[Microbatch]:
        """This data-parallel rank's part of samples [first_sample, first_sample + num_samples).

        Micro-batch m of rank r takes the r-th run of micro_batch_size samples of the m-th slice. Slots beyond
        num_samples repeat earlier samples with loss weight 0 (validation sets that the layout does not divide).
        """
        size, ranks = self.config.training.micro_batch_size, self.runtime.layout.data
        for microbatch in range(num_microbatches):
            slot = (microbatch * ranks + self.runtime.data_parallel_rank) * size
            slots = range(slot, slot + size)
            indices = [first_sample + one % num_samples for one in slots]
            yield self._build(indices, counted=[one < num_samples for one in slots])

    def _build(self, indices: list[int], counted: list[bool]) -> Microbatch:
        device = self.runtime.device.torch_device
        config = self.config
        if not (self.runtime.is_first_stage or self.runtime.is_last_stage):
            cu_seqlens, longest = make_segments(indices, config.data.sequence_length, config.diffusion, self.noise_seed)
            return Microbatch(pack(cu_seqlens.to(device), longest), None)
        batch = make_masked_batch(self.corpus, indices, config.diffusion, config.model.mask_token_id, self.noise_seed)
        if not all(counted):
            batch.loss_weight[~torch.tensor(counted)] = 0.0
        batch = batch.to(device)
        return Microbatch(pack(batch.cu_seqlens, batch.max_seqlen), batch)


def forward_step(
    microbatches: Iterator[Microbatch], model: torch.nn.Module
) -> tuple[Tensor | MaskedLoss, Callable[..., Any]]:
    """One stage's forward pass, in the signature of megatron-core's schedules: (output, function of the loss)."""
    microbatch = next(microbatches)
    batch = microbatch.batch
    if batch is None:
        return model(None, microbatch.segments), _no_loss
    output = model(
        batch.tokens.view(1, -1),
        microbatch.segments,
        labels=batch.labels.view(-1),
        loss_weight=batch.loss_weight.view(-1),
    )
    return output, partial(_loss, batch)


def _loss(batch: MaskedBatch, output: MaskedLoss) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of the micro-batch in nats/token, the step's sums).

    The schedule divides by the number of micro-batches and DDP averages over data parallel, which makes it
    sum(CE / p) / (tokens of the global batch), once.
    """
    return output.loss_sum / batch.tokens.numel(), {"sums": microbatch_sums(output, batch)}


def _no_loss(_: Any) -> Any:
    raise RuntimeError("a middle stage has no loss; megatron-core's schedule took it for the last one")

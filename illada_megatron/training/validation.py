"""The held-out bound: the training objective on samples and masks that never change."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from illada_megatron.model import MaskPredictor
from illada_megatron.training.forward_step import BatchSlice, BatchSource, Microbatch, forward_step
from illada_megatron.training.metrics import StepSums, reduce_sums


@dataclass(frozen=True)
class HeldOut:
    """Held-out figures."""

    bound: float
    """Upper bound of the negative log-likelihood, nats/token."""
    masked_cross_entropy: float
    """Mean CE of a masked token, nats."""
    num_tokens: int

    def noted(self, step: int) -> dict[str, float] | None:
        """For a checkpoint, whose exports say it; None where it is no number."""
        found = {"step": step, "bound_nats_per_token": self.bound, "tokens": self.num_tokens}
        return found if math.isfinite(self.bound) else None


def run_schedule(
    source: BatchSource,
    chunks: list[torch.nn.Module],
    microbatches: Iterator[Microbatch],
    batch_size: int,
    forward_only: bool,
) -> list[Tensor]:
    """Run megatron-core's schedule over the next micro-batches of `source`, as many as `batch_size` samples take;
    returns this rank's sums of them (last stage)."""
    config, runtime = source.config, source.runtime
    device = runtime.device.torch_device
    num_microbatches = runtime.layout.microbatches(batch_size, config.training.micro_batch_size)
    tokens = batch_size * config.data.sequence_length / (num_microbatches * runtime.layout.data)
    on_device = (microbatch.to(device) for microbatch in itertools.islice(microbatches, num_microbatches))
    iterators = itertools.tee(on_device, len(chunks))  # the chunks of an interleaved schedule share them
    losses = get_forward_backward_func()(
        forward_step_func=partial(forward_step, num_microbatches, tokens),
        data_iterator=list(iterators) if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        # A micro-batch travels as one packed row.
        seq_length=config.training.micro_batch_size * config.data.sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return [loss["sums"] for loss in losses] if runtime.is_last_stage else []


def speaks_for_tensor_group() -> bool:
    """Whether this rank's sums count: tensor-parallel ranks all hold the same."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


def evaluate(chunks: list[torch.nn.Module] | list[MaskPredictor], source: BatchSource, num_samples: int) -> HeldOut:
    """The bound over the first `num_samples` held-out samples; every rank gets the same figures."""
    config, runtime = source.config, source.runtime
    num_microbatches = runtime.layout.microbatches(num_samples, config.training.micro_batch_size)
    for chunk in chunks:
        chunk.eval()
    slices = (BatchSlice(0, num_samples, microbatch) for microbatch in range(num_microbatches))
    with torch.no_grad(), source.prefetch(slices) as microbatches:
        local = run_schedule(source, list(chunks), microbatches, num_samples, forward_only=True)
    for chunk in chunks:
        chunk.train()
    sums: StepSums = reduce_sums(local, speaks_for_tensor_group(), runtime.device.torch_device)
    num_tokens = num_samples * config.data.sequence_length
    return HeldOut(sums.weighted / num_tokens, sums.masked_cross_entropy, num_tokens)

"""The held-out bound of a model: it runs over the samples of `diffusion/held_out.py`, and keeps each one's loss."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from illada_megatron.config.layout import row_tokens
from illada_megatron.data.corpus.text_bytes import TokenBytes, window_bytes
from illada_megatron.diffusion import MaskedBatch
from illada_megatron.diffusion.held_out import HeldOutSamples
from illada_megatron.model import MaskPredictor
from illada_megatron.ops.masked_linear_cross_entropy import MaskedLoss
from illada_megatron.ops.tensor_fields import moved_to
from illada_megatron.training.forward_step import BatchSlice, BatchSource, Microbatch, Sums, forward_step
from illada_megatron.training.held_out_figures import POSITION_BINS, HeldOut, position_bins, text_figures
from illada_megatron.training.metrics import microbatch_sums

_ROUND_MICROBATCHES = 32
"""Of a rank, between two looks at what all ranks have: bubbles of a pipeline are small beside them."""


@dataclass(frozen=True)
class HeldOutSource:
    """The held-out samples of a run, and what their tokens' text takes."""

    batches: BatchSource[HeldOutSamples]
    token_bytes: TokenBytes | str
    """Or why it is not known."""
    _window_bytes: dict[tuple[str, int], float] = field(default_factory=dict)
    """By text and window, as far as they were counted: validations look at the same ones again."""

    @property
    def samples(self) -> HeldOutSamples:
        return self.batches.maker

    def bytes_of(self, index: int) -> float:
        """Of the text behind a sample's tokens; NaN: not known."""
        assert not isinstance(self.token_bytes, str)
        corpus, window = self.samples.window(index)
        if (corpus.name, window) not in self._window_bytes:
            self._window_bytes[corpus.name, window] = window_bytes(self.token_bytes, corpus, window)
        return self._window_bytes[corpus.name, window]


@dataclass
class Losses:
    """What an evaluation has so far: its samples [0, done)."""

    nats: NDArray[np.float64]
    """Weighted CE of each sample by part of the window `[samples, position bins]`."""
    num_bytes: NDArray[np.float64]
    """Of text behind each sample's tokens `[samples]`; NaN: not known."""
    done: int = 0

    @classmethod
    def none_yet(cls, samples: HeldOutSamples) -> "Losses":
        parts = min(POSITION_BINS, samples.sequence_length)
        return cls(np.zeros((len(samples), parts)), np.zeros(len(samples)))


def run_schedule(
    source: BatchSource[Any],
    chunks: list[torch.nn.Module],
    microbatches: Iterator[Microbatch],
    batch_size: int,
    forward_only: bool,
    sums: Sums = microbatch_sums,
) -> list[Tensor]:
    """Run megatron-core's schedule over the next micro-batches of `source`, as many as `batch_size` samples take;
    returns what `sums` keeps of each (this rank's, in their order, on the last stage)."""
    config, runtime = source.config, source.runtime
    device = runtime.device.torch_device
    num_microbatches = runtime.layout.microbatches(batch_size, config.training.micro_batch_size)
    tokens = batch_size * config.data.sequence_length / (num_microbatches * runtime.layout.data)
    on_device = (moved_to(microbatch, device) for microbatch in itertools.islice(microbatches, num_microbatches))
    iterators = itertools.tee(on_device, len(chunks))  # the chunks of an interleaved schedule share them
    losses = get_forward_backward_func()(
        forward_step_func=partial(forward_step, num_microbatches, tokens, sums),
        data_iterator=list(iterators) if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        # A micro-batch travels as one packed row; where its length differs, stages ask each other.
        seq_length=row_tokens(config) or config.training.micro_batch_size * config.data.sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return [loss["sums"] for loss in losses] if runtime.is_last_stage else []


def speaks_for_tensor_group() -> bool:
    """Whether this rank's sums count: tensor-parallel ranks all hold the same."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


def evaluate(
    chunks: Sequence[torch.nn.Module] | Sequence[MaskPredictor],
    source: HeldOutSource,
    losses: Losses | None = None,
    after_round: Callable[[Losses], None] = lambda _: None,
) -> HeldOut:
    """The bound over the held-out samples; every rank calls it and gets the same figures.

    losses: of an evaluation that was interrupted, the same on all ranks; those that lack are computed.
    after_round: is given what there is, every few micro-batches.
    """
    losses = losses or Losses.none_yet(source.samples)
    config, layout = source.batches.config, source.batches.runtime.layout
    micro_batch_size = config.training.micro_batch_size
    size = _ROUND_MICROBATCHES * layout.data * micro_batch_size
    rounds = [
        (first, min(size, len(source.samples) - first)) for first in range(losses.done, len(source.samples), size)
    ]
    slices = (
        BatchSlice(first, count, microbatch)
        for first, count in rounds
        for microbatch in range(layout.microbatches(count, micro_batch_size))
    )
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), source.batches.prefetch(slices) as microbatches:
        for first, count in rounds:
            local = run_schedule(source.batches, list(chunks), microbatches, count, forward_only=True, sums=sample_sums)
            _gather(local, source, losses, first, count)
            after_round(losses)
    for chunk in chunks:
        chunk.train()
    return held_out_figures(source, losses)


def sample_sums(loss: MaskedLoss, batch: MaskedBatch, counted: int) -> Tensor:
    """Of each of a micro-batch's first `counted` samples: its index, and the weighted CE (nats) of each part of the
    window, float64 `[counted, 1 + position bins]`."""
    samples, length = batch.tokens.shape
    parts = torch.from_numpy(position_bins(length)).to(batch.tokens.device)
    num_parts = min(POSITION_BINS, length)
    sums = torch.zeros(samples * num_parts, dtype=torch.float64, device=batch.tokens.device)
    weighted = loss.cross_entropy.double() * batch.loss_weight.view(-1)[loss.rows].double()
    sums.index_add_(0, loss.rows // length * num_parts + parts[loss.rows % length], weighted)
    return torch.cat([batch.sample_index.double()[:, None], sums.view(samples, num_parts)], dim=1)[:counted]


def held_out_figures(source: HeldOutSource, losses: Losses) -> HeldOut:
    """What the samples' losses say of each text."""
    samples, unknown = source.samples, source.token_bytes if isinstance(source.token_bytes, str) else None
    count, texts = samples.num_samples, []
    for number, corpus in enumerate(samples.corpora):
        mine = slice(number * count, (number + 1) * count)
        num_bytes = losses.num_bytes[mine]
        if unknown is None and np.isnan(num_bytes).any():
            unknown = f"the tokenizer's own text of {corpus.name or 'the held-out tokens'} is not that of its tokens"
        indices = range(mine.start, mine.stop)
        t = np.array([samples.t(index) for index in indices])
        windows = np.array([samples.window(index)[1] for index in indices])
        known = None if isinstance(source.token_bytes, str) or np.isnan(num_bytes).any() else num_bytes
        texts.append(
            text_figures(corpus.name, corpus.num_windows, samples.sequence_length, t, losses.nats[mine], known, windows)
        )
    return HeldOut(texts, unknown)


def _gather(local: list[Tensor], source: HeldOutSource, losses: Losses, first: int, count: int) -> None:
    """Put the round's samples [first, first + count) of all ranks into `losses`."""
    parts = losses.nats.shape[1]
    table = torch.zeros(count, parts + 1, dtype=torch.float64)
    if local and speaks_for_tensor_group():
        rows = torch.cat(local).cpu()
        indices = rows[:, 0].long()
        table[indices - first, :parts] = rows[:, 1:]
        # context-parallel ranks have the same samples, each a part of their losses
        if not isinstance(source.token_bytes, str) and source.batches.runtime.context_parallel_rank == 0:
            num_bytes = [source.bytes_of(index) for index in indices.tolist()]
            table[indices - first, parts] = torch.tensor(num_bytes, dtype=torch.float64)
    table = table.to(source.batches.runtime.device.torch_device)
    dist.all_reduce(table)
    done = slice(first, first + count)
    losses.nats[done], losses.num_bytes[done] = table[:, :parts].cpu().numpy(), table[:, parts].cpu().numpy()
    losses.done = first + count

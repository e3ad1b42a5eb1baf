"""What is trained, and the ways it can be laid out over GPUs: what memory and speed are computed from."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from illada_megatron.config import RunConfig
from illada_megatron.config.parameters import EMBEDDING, FINAL_NORM, HEAD, parameters
from illada_megatron.config.pipeline_split import expected_flops, split_layers
from illada_megatron.config.schema import DiffusionConfig, ModelConfig
from illada_megatron.config.schema.precision import Recipe

Split = tuple[tuple[int, ...], ...]
"""[pipeline rank][model chunk] -> number of layers."""


@dataclass(frozen=True)
class Workload:
    """A run, without its layout."""

    model: ModelConfig
    sequence_length: int
    global_batch_size: int
    train_tokens: float
    """Of the whole run."""
    attended: float
    """Positions that a token attends to, on average; a causal model's: half the sequence."""
    masked_share: float
    """Of the tokens, those that meet the vocabulary."""
    master_bytes: int = 12
    """A parameter's fp32 main weight and Adam's two moments; with fp32 weights the moments alone."""
    average_bytes: int = 0
    """A parameter's moving average (optimizer.ema_decay)."""
    weight_bytes: int = 2
    """bf16; 4: fp32."""
    gradient_bytes: int = 4
    """Of a gradient in megatron-core's buffer..."""
    sent_gradient_bytes: int = 4
    """...and on its way to the other ranks."""
    shards_optimizer: bool = True
    """Over the data-parallel ranks."""
    fp8_recipe: Recipe = "tensorwise"
    fp8_param_gather: bool = False
    """Ranks keep the layers' weights in FP8 alone."""
    fp8_bf16_layers: int = 2
    """First and last layers that stay bf16 in an FP8 run."""
    diffusion: DiffusionConfig = DiffusionConfig()  # noqa: RUF009 (frozen)
    """By which `parallel.pipeline_layout: auto` weighs the head."""
    logits_bytes: int | None = None
    """What the loss's logits may take at a time; None: 2 % of a GPU's memory."""

    @cached_property
    def linear_elements(self) -> int:
        """Weights of a layer's four linear projections."""
        model = self.model
        attention = 2 * model.head_dim * (model.num_attention_heads + model.num_query_groups)
        return model.hidden_size * (attention + 3 * model.ffn_hidden_size)

    @cached_property
    def held(self) -> "dict[int, Held]":
        """Tensor parallel size -> what a rank holds, of the sizes that were asked for."""
        return {}

    @cached_property
    def splits(self) -> "dict[int, list[tuple[int, str, Split]]]":
        """Pipeline size -> (model chunks, parallel.pipeline_layout, split), of the sizes that were asked for."""
        return {}

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, without recomputation, as `training/flops.py` counts a step: all pairs of a segment's
        positions, masked tokens alone at the head."""
        model = self.model
        pairs = 4 * self.attended * model.num_attention_heads * model.head_dim
        head = 2 * self.masked_share * model.hidden_size * model.vocab_size
        return 3 * (model.num_layers * (2 * self.linear_elements + pairs) + head)


def workload(config: RunConfig) -> Workload:
    """Of a configuration, whatever its layout is."""
    training, length = config.training, config.data.sequence_length
    fp32, megabytes = training.precision == "fp32", config.loss.chunk_memory_mb
    moments = 8 if config.optimizer.moments_dtype == "fp32" else 4
    return Workload(
        model=config.model,
        sequence_length=length,
        global_batch_size=training.global_batch_size,
        train_tokens=float(training.train_steps) * training.global_batch_size * length,
        attended=mean_attended(config.diffusion, length),
        masked_share=mean_masked(config.diffusion),
        master_bytes=moments + (0 if fp32 else 4),
        average_bytes=0 if config.optimizer.ema_decay is None else 4,
        weight_bytes=4 if fp32 else 2,
        sent_gradient_bytes=2 if config.parallel.grad_reduce_in_bf16 else 4,
        shards_optimizer=config.parallel.use_distributed_optimizer,
        fp8_recipe=config.fp8.recipe,
        fp8_param_gather=config.fp8.param_gather,
        fp8_bf16_layers=sum(config.fp8.bf16_layers),
        diffusion=config.diffusion,
        logits_bytes=None if megabytes is None else megabytes * 10**6,
    )


def mean_attended(diffusion: DiffusionConfig, length: int) -> float:
    """Mean over tokens of the length of their segment: E[x^2 + (1 - x)^2] = 2/3 of the sequence where it is cut at a
    uniform x (ILLaDA, 30 % of them). Shortened sequences and documents are counted as whole ones."""
    if diffusion.attention_boundary != "split":
        return float(length)
    return length * (1 - diffusion.split_probability / 3)


def mean_masked(diffusion: DiffusionConfig) -> float:
    """Mean share of masked tokens, t uniform in [t_min, t_max]: linear (1 - eps) t + eps, or cos(pi / 2 (1 - t))."""
    low, high = diffusion.t_min, diffusion.t_max
    if diffusion.noise_schedule == "linear":
        share = (low + high) / 2
    else:
        share = 2 / math.pi * (math.sin(math.pi / 2 * (1 - low)) - math.sin(math.pi / 2 * (1 - high))) / (high - low)
    return (1 - diffusion.eps) * share + diffusion.eps


class Candidate(NamedTuple):
    """A layout: the sizes of the process groups, and what is chosen with them."""

    gpus: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    micro_batch_size: int
    recompute: str
    """none, selective, full."""
    precision: str
    """bf16 or fp8 (fp32: for tests on a CPU)."""
    split: Split
    pipeline_layout: str = "even"
    """parallel.pipeline_layout, which the split is made by."""

    @property
    def data(self) -> int:
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def gradient_ranks(self) -> int:
        """Ranks with the same weights: over them gradients are summed and the optimizer is divided (context parallel
        ranks are among them)."""
        return self.data * self.context

    def microbatches(self, global_batch_size: int) -> int:
        """Of a step, a data-parallel rank, with empty places where the batch does not fill them (pad_global_batch)."""
        count = -(-global_batch_size // (self.micro_batch_size * self.data))
        return count if self.virtual == 1 else -(-count // self.pipeline) * self.pipeline

    def tokens(self, sequence_length: int) -> int:
        """Of a micro-batch, a context-parallel rank."""
        return self.micro_batch_size * sequence_length // self.context


def splits(work: Workload, pipeline: int, virtual: int) -> list[tuple[str, Split]]:
    """(parallel.pipeline_layout, what it makes of the layers): even, and auto where that is another."""
    flops = expected_flops(work.model, work.diffusion, work.sequence_length)
    found: list[tuple[str, Split]] = []
    for layout in ("even", "auto") if pipeline > 1 else ("even",):
        with suppress(ValueError):
            one = as_split(split_layers(work.model, pipeline, virtual, layout, flops))
            if one not in [other for _, other in found]:
                found.append((layout, one))
    return found


def as_split(split: Sequence[Sequence[int]]) -> Split:
    """Hashable."""
    return tuple(tuple(chunks) for chunks in split)


class Held(NamedTuple):
    """Elements that a tensor-parallel rank holds."""

    table: int
    """The embedding, and as much the head where it is not the embedding."""
    linear: int
    """A layer's projections, which FP8 quantises."""
    rest: int
    """A layer's norms and biases."""
    final_norm: int


def held_elements(work: Workload, tensor: int) -> Held:
    """By the shapes of `config/parameters.py`, which checkpoints are made of."""
    if tensor not in work.held:
        one_layer = work.model.model_copy(update={"num_layers": 1})
        sizes = {one.name: math.prod(one.held_shape(tensor)) for one in parameters(one_layer)}
        layer = {name: size for name, size in sizes.items() if name not in (EMBEDDING, HEAD, FINAL_NORM)}
        linear = sum(size for name, size in layer.items() if name.endswith("weight") and "linear" in name)
        work.held[tensor] = Held(sizes[EMBEDDING], linear, sum(layer.values()) - linear, sizes[FINAL_NORM])
    return work.held[tensor]


class StageElements(NamedTuple):
    """Elements that one rank holds."""

    linear: int
    rest: int
    tables: int

    @property
    def total(self) -> int:
        return sum(self)


def stage_elements(work: Workload, candidate: Candidate, stage: int) -> StageElements:
    """Of pipeline rank `stage`: its layers; on the first the embedding; on the last the final norm and the head, which
    is a copy of the embedding where the two are tied and the pipeline has several stages."""
    held = held_elements(work, candidate.tensor)
    layers, first, last = sum(candidate.split[stage]), stage == 0, stage == candidate.pipeline - 1
    head = last and not (work.model.tie_word_embeddings and first)
    return StageElements(layers * held.linear, layers * held.rest + last * held.final_norm, (first + head) * held.table)

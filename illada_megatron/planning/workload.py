"""What is trained, and the ways it can be laid out over GPUs: what memory and speed are computed from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from illada_megatron.config import RunConfig
from illada_megatron.config.expected_work import mean_attended, mean_masked
from illada_megatron.config.parameters import EMBEDDING, FINAL_NORM, HEAD, Parameter, parameters
from illada_megatron.config.pipeline_split import first_layers, part_flops
from illada_megatron.config.schema import DiffusionConfig, Fp8Config, ModelConfig

StageLayers = tuple[tuple[int, ...], ...]
"""[pipeline rank][model chunk] -> number of layers: a `Split` of config/pipeline_split.py that can be hashed."""


class Elements(NamedTuple):
    """Of the whole model's tensors."""

    table: int
    """The embedding, and as much the head where it is not the embedding."""
    linear: int
    """A layer's four projections, which FP8 quantises."""
    biases: int
    """A layer's, divided as its projections."""
    norms: int
    """A layer's, which tensor parallel ranks all hold."""
    final_norm: int


def _kind(one: Parameter) -> str:
    """Which of `Elements` a parameter is."""
    if one.name in (EMBEDDING, FINAL_NORM):
        return "table" if one.name == EMBEDDING else "final_norm"
    if one.split is None:
        return "norms"
    return "linear" if one.name.endswith("weight") else "biases"


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
    fp8: Fp8Config = Fp8Config()  # noqa: RUF009 (frozen)
    """Of its layouts in FP8."""
    tp_comm_overlap: bool = False
    """Tensor parallel communication goes through userbuffers."""
    diffusion: DiffusionConfig = DiffusionConfig()  # noqa: RUF009 (frozen)
    """By which `parallel.pipeline_layout: auto` weighs the head."""
    logits_bytes: int | None = None
    """What the loss's logits may take at a time; None: 2 % of a GPU's memory."""

    @property
    def rows_differ(self) -> bool:
        """With context parallelism, micro-batches in their length (config/layout.py, row_tokens)."""
        return self.diffusion.attention_boundary == "document"

    @property
    def sums_gradients(self) -> bool:
        """A rank adds up in fp32 what all others send it of its part, narrower than gradients are kept
        (`training/gradient_reduction.py`); else NCCL's reduce-scatter adds on the way, in the format that travels."""
        return self.sent_gradient_bytes < self.gradient_bytes

    @cached_property
    def elements(self) -> Elements:
        """By the shapes of `config/parameters.py`, which checkpoints are made of."""
        found = dict.fromkeys(Elements._fields, 0)
        for one in parameters(self.model.model_copy(update={"num_layers": 1})):
            if one.name != HEAD:
                found[_kind(one)] += math.prod(one.shape)
        return Elements(**found)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, without recomputation, as `training/flops.py` counts a step: all pairs of a segment's
        positions, masked tokens alone at the head."""
        layer, head = part_flops(self.model, 1, self.attended, self.masked_share)
        return self.model.num_layers * layer + head


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
        fp8=config.fp8,
        tp_comm_overlap=config.parallel.tp_comm_overlap,
        diffusion=config.diffusion,
        logits_bytes=None if megabytes is None else megabytes * 10**6,
    )


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
    split: StageLayers
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


def stage_layers(split: Sequence[Sequence[int]]) -> StageLayers:
    """The same, hashable."""
    return tuple(tuple(chunks) for chunks in split)


def bf16_split(work: Workload, candidate: Candidate) -> StageLayers:
    """[pipeline rank][model chunk] -> how many of its layers stay bf16 in an FP8 run (fp8.num_layers_at_start_in_bf16,
    ..._end_...)."""
    ends = work.fp8.bf16_layers if candidate.precision == "fp8" else (0, 0)
    return _within_ends(candidate.split, *ends)


@lru_cache(maxsize=1024)
def _within_ends(split: StageLayers, first: int, last: int) -> StageLayers:
    """Of each chunk, the layers among the model's `first` and `last` ones."""
    if not first and not last:
        return tuple((0,) * len(chunks) for chunks in split)
    total = sum(sum(chunks) for chunks in split)
    ends = {*range(first), *range(total - last, total)}
    begins = first_layers(split)
    return tuple(
        tuple(len(ends.intersection(range(begin, begin + count))) for begin, count in zip(*both, strict=True))
        for both in zip(begins, split, strict=True)
    )


def has_userbuffers(work: Workload, candidate: Candidate) -> bool:
    """parallel.tp_comm_overlap, where a layout can have it (config/communication.py, config/layout.py)."""
    blockwise = candidate.precision == "fp8" and work.fp8.recipe == "blockwise"
    possible = candidate.tensor > 1 and not blockwise and not (candidate.context > 1 and work.rows_differ)
    return work.tp_comm_overlap and possible


class StageElements(NamedTuple):
    """Elements that one rank holds."""

    linear: int
    """Projections, but those of layers that stay bf16 in an FP8 run."""
    rest: int
    tables: int

    @property
    def total(self) -> int:
        return sum(self)


def stage_elements(work: Workload, candidate: Candidate, stage: int) -> StageElements:
    """Of pipeline rank `stage`: its layers; on the first the embedding; on the last the final norm and the head, which
    is a copy of the embedding where the two are tied and the pipeline has several stages."""
    whole, ranks = work.elements, candidate.tensor
    linear, biases, table = whole.linear // ranks, whole.biases // ranks, whole.table // ranks
    layers, bf16 = sum(candidate.split[stage]), sum(bf16_split(work, candidate)[stage])
    first, last = stage == 0, stage == candidate.pipeline - 1
    head = last and not (work.model.tie_word_embeddings and first)
    rest = layers * (biases + whole.norms) + bf16 * linear + last * whole.final_norm
    return StageElements((layers - bf16) * linear, rest, (first + head) * table)

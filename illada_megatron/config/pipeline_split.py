"""Which layers each pipeline stage computes (parallel.pipeline_layout), and what share of a step that is.

A stage is a rank's part of the model; with interleaving it has several chunks, and a micro-batch passes through chunk 0
of all ranks, then chunk 1 of all ranks, ... (arXiv 2104.04473, section 2.2).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from illada_megatron.config.expected_work import mean_attended, mean_masked
from illada_megatron.config.schema import DiffusionConfig, ModelConfig
from illada_megatron.system.terminal import counted

Split = list[list[int]]
"""[pipeline rank][model chunk] -> its number of layers."""
UNEVEN_OPTIONS = (
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)


class PartFlops(NamedTuple):
    """Floating-point operations of a forward and a backward pass. The embedding copies rows: it multiplies nothing."""

    layer: float
    head: float


@dataclass(frozen=True)
class Stage:
    """What a pipeline rank has."""

    layers: tuple[int, ...]
    """Of each chunk."""
    flops_share: float
    """Of a step's FLOPs, 1 over all stages."""
    parameters: int
    """Of all its tensor-parallel ranks; a tied embedding that first and last stage both keep counts in both."""


def part_flops(model: ModelConfig, tokens: float, sum_squared_lengths: float, masked_tokens: float) -> PartFlops:
    """Of one layer and of the head, for `tokens`, of which `masked_tokens` meet the vocabulary.

    A product of [m, k] and [k, n] counts 2mkn; the backward pass takes twice the forward's. Layer: every token through
    every linear weight, and q k^T and a v over all pairs of a segment's positions (bidirectional, so the sum of
    length^2 over segments, twice a causal table's). Derived in docs/training.md.
    """
    hidden, dim = model.hidden_size, model.head_dim
    attention_weights = hidden * dim * 2 * (model.num_attention_heads + model.num_query_groups)
    linear = 2 * tokens * (attention_weights + 3 * hidden * model.ffn_hidden_size)
    pairs = 4 * sum_squared_lengths * model.num_attention_heads * dim
    return PartFlops(3.0 * (linear + pairs), 3.0 * 2 * masked_tokens * hidden * model.vocab_size)


def expected_flops(model: ModelConfig, diffusion: DiffusionConfig, sequence_length: int) -> PartFlops:
    """Of a sample, on average (expected_work.py)."""
    pairs = sequence_length * mean_attended(diffusion, sequence_length)
    return part_flops(model, sequence_length, pairs, sequence_length * mean_masked(diffusion))


def split_layers(model: ModelConfig, pipeline: int, virtual: int, layout: str, flops: PartFlops) -> Split:
    """The layers of each chunk under `layout`: "even", "auto" or Megatron's notation ("Ettt|ttt|tttL").

    auto: no stage computes longer than it has to (FLOPs, the head's among them); of the splits that are equal in that,
    the one whose largest stage has the fewest parameters (the embedding's among them) and then has its layers late,
    where fewer micro-batches are in flight. Every chunk has a layer.

    Raises ValueError with the fields, the numbers and the fix.
    """
    if layout == "even":
        return _even(model.num_layers, pipeline, virtual)
    if layout == "auto":
        return _balanced(model, pipeline, virtual, flops)
    return _written(model.num_layers, pipeline, virtual, layout)


def unrolled(layout: str) -> str:
    """Megatron's notation written out, as megatron-core reads it (transformer/pipeline_parallel_layer_layout.py): `x*3`
    is xxx, `(tt|)*3` is tt|tt|tt|, commas mean nothing."""
    text = re.sub(r"\(([^)]+)\)\*(\d{1,3})", lambda found: found[1] * int(found[2]), layout.replace(",", ""))
    return re.sub(r"(.)\*(\d{1,3})", lambda found: found[1] * int(found[2]), text)


def is_even(split: Split) -> bool:
    """Whether all chunks have the same number of layers."""
    return len({layers for chunks in split for layers in chunks}) == 1


def first_layers(split: Sequence[Sequence[int]]) -> list[list[int]]:
    """[pipeline rank][model chunk] -> the number of its first layer, from 0 on."""
    first = [[0] * len(chunks) for chunks in split]
    before = 0
    for chunk in range(len(split[0])):
        for rank, chunks in enumerate(split):
            first[rank][chunk] = before
            before += chunks[chunk]
    return first


def megatron_layout(split: Split) -> str:
    """Megatron's notation of it (--pipeline-model-parallel-layout): E embedding, t a layer, L the head and its loss."""
    chunks = ["t" * split[rank][chunk] for chunk in range(len(split[0])) for rank in range(len(split))]
    return f"E{'|'.join(chunks)}L"


def split_of_megatron(num_layers: int, pipeline: int, virtual: int, options: Mapping[str, Any]) -> Split:
    """What Megatron's other options for uneven stages mean, by their names without dashes (megatron-core's
    get_num_layers_to_build and get_transformer_layer_offset): layers of the first and of the last stage, which its
    chunks share evenly, or a layer less where the embedding or the loss counts as one.

    Raises ValueError where Megatron would refuse them.
    """
    first, last, *parts = (options.get(name) for name in UNEVEN_OPTIONS)
    ends = [int(bool(part)) for part in parts]
    between = num_layers + sum(ends) - (first or 0) - (last or 0)
    others = pipeline - (first is not None) - (last is not None)
    counts = [between // max(1, others)] * pipeline
    counts[0], counts[-1] = first or counts[0], last or counts[-1]
    if others < 0 or sum(counts) != num_layers + sum(ends) or any(count % virtual for count in counts):
        told = ", ".join(f"{name} {value}" for name, value in options.items())
        raise ValueError(
            f"{num_layers} layers cannot be divided over {pipeline} stages of {virtual} chunks with {told}: write "
            "parallel.pipeline_layout"
        )
    split = [[count // virtual] * virtual for count in counts]
    split[0][0] -= ends[0]
    split[-1][-1] -= ends[1]
    return split


def stages(model: ModelConfig, split: Split, flops: PartFlops) -> list[Stage]:
    """What each pipeline rank has."""
    layer, vocabulary = _parameters(model)
    total = model.num_layers * flops.layer + flops.head
    found = []
    for rank, chunks in enumerate(split):
        is_first, is_last = rank == 0, rank == len(split) - 1
        count, computed = sum(chunks) * layer, sum(chunks) * flops.layer
        if is_first:
            count += vocabulary
        if is_last:
            count += model.hidden_size  # the final norm
            computed += flops.head
            count += 0 if is_first and model.tie_word_embeddings else vocabulary
        found.append(Stage(tuple(chunks), computed / total, count))
    return found


def stage_lines(found: list[Stage]) -> list[str]:
    """For a table; neighbours that have the same share a line."""
    lines = []
    for stage, group in groupby(range(len(found)), lambda rank: found[rank]):
        ranks = list(group)
        numbers = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        chunks = f" ({' + '.join(map(str, stage.layers))})" if len(stage.layers) > 1 else ""
        lines.append(
            f"{numbers}: {counted(sum(stage.layers), 'layer')}{chunks}, {100 * stage.flops_share:.1f} % of the FLOPs, "
            f"{stage.parameters / 1e6:,.1f} million parameters"
        )
    return lines


def _parameters(model: ModelConfig) -> tuple[int, int]:
    """Of a layer, and of an embedding or a head."""
    vocabulary = model.padded_vocab_size * model.hidden_size
    tables = vocabulary * (1 if model.tie_word_embeddings else 2)
    return (model.num_parameters - tables - model.hidden_size) // model.num_layers, vocabulary


def _even(num_layers: int, pipeline: int, virtual: int) -> Split:
    chunks = pipeline * virtual
    if num_layers % chunks:
        raise ValueError(
            f"model.num_layers {num_layers} is not a multiple of pipeline * virtual pipeline size {chunks}: "
            "change model.num_layers, parallel.pipeline_model_parallel_size or virtual_pipeline_model_parallel_size, "
            "or set parallel.pipeline_layout=auto"
        )
    return [[num_layers // chunks] * virtual for _ in range(pipeline)]


def _balanced(model: ModelConfig, pipeline: int, virtual: int, flops: PartFlops) -> Split:
    chunks = pipeline * virtual
    if model.num_layers < chunks:
        raise ValueError(
            f"model.num_layers {model.num_layers} is below pipeline * virtual pipeline size {chunks}, and every chunk "
            "needs a layer: lower parallel.pipeline_model_parallel_size or virtual_pipeline_model_parallel_size"
        )
    layer, vocabulary = _parameters(model)
    head = flops.head / flops.layer  # in layers
    least, last = [virtual] * pipeline, pipeline - 1
    # Layers are all alike, so giving each to whoever has least makes the largest as small as it can be.
    quickest = _filled(least, model.num_layers, [head if rank == last else 0.0 for rank in range(pipeline)])
    longest = max(count + (head if rank == last else 0.0) for rank, count in enumerate(quickest))
    most = [int(longest - (head if rank == last else 0.0) + 1e-9) for rank in range(pipeline)]
    tables = [0.0] * pipeline
    tables[0] += vocabulary / layer
    tables[last] += vocabulary / layer
    counts = _filled(least, model.num_layers, tables, [max(pair) for pair in zip(most, least, strict=True)])
    of_chunks = [[0.0] * (virtual - 1) + [head if rank == last else 0.0] for rank in range(pipeline)]
    return [_filled([1] * virtual, count, extra) for count, extra in zip(counts, of_chunks, strict=True)]


def _filled(least: list[int], total: int, extra: list[float], most: list[int] | None = None) -> list[int]:
    """`total` layers over places that have `extra` besides: from `least` on each goes to the place with least that may
    have more, of equal ones to the last."""
    counts = list(least)
    for _ in range(total - sum(least)):
        open_ = [place for place, count in enumerate(counts) if most is None or count < most[place]]
        counts[min(reversed(open_), key=lambda place: counts[place] + extra[place])] += 1
    return counts


def _written(num_layers: int, pipeline: int, virtual: int, layout: str) -> Split:
    text = unrolled(layout)
    name = f"parallel.pipeline_layout {layout!r}"
    if not re.fullmatch(r"E[t|]*L", text):
        raise ValueError(
            f"{name} reads as {text!r}, expected E (the embedding) first, L (the head) last and between them only t (a "
            "layer) and | (the end of a stage): correct it, or take auto or even"
        )
    counts = [len(part) for part in text[1:-1].split("|")]
    if len(counts) != pipeline * virtual:
        raise ValueError(
            f"{name} has {len(counts)} stages, expected pipeline * virtual pipeline size {pipeline} * {virtual} = "
            f"{pipeline * virtual}: correct it, parallel.pipeline_model_parallel_size or "
            "virtual_pipeline_model_parallel_size"
        )
    if sum(counts) != num_layers:
        raise ValueError(f"{name} has {sum(counts)} layers, model.num_layers is {num_layers}: correct one of them")
    if 0 in counts:
        raise ValueError(f"{name}: stage {counts.index(0) + 1} has no layer, expected one at least: give it one")
    return [[counts[chunk * pipeline + rank] for chunk in range(virtual)] for rank in range(pipeline)]

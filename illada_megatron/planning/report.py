"""A planned layout in words and numbers: the row of a table, its arithmetic line by line, a JSON object."""

from typing import Any

from illada_megatron.planning.device import Device
from illada_megatron.planning.memory import activations
from illada_megatron.planning.search import MEMORY_SHARE, Planned
from illada_megatron.planning.workload import Candidate, Workload, has_userbuffers

_GIB = 2**30
MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")
"""Activations: with those of one layer's backward pass."""


def layout_words(one: Candidate) -> str:
    """TP2 PP8 VP5 CP1 DP64; behind VP the layout of the pipeline where it is not even."""
    auto = "" if one.pipeline_layout == "even" else f" {one.pipeline_layout}"
    return f"TP{one.tensor} PP{one.pipeline} VP{one.virtual}{auto} CP{one.context} DP{one.data}"


def memory_gib(planned: Planned) -> dict[str, float]:
    """By MEMORY_COLUMNS."""
    parts = {name: part.value / _GIB for name, part in planned.memory.parts.items()}
    parts["activations"] += parts.pop("backward")
    return parts


def overrides(work: Workload, one: Candidate) -> list[str]:
    """What a configuration has to say for this layout."""
    fields = {
        "parallel.layouts": "[]",  # which would be taken instead
        "parallel.tensor_model_parallel_size": one.tensor,
        "parallel.sequence_parallel": str(one.tensor > 1).lower(),
        "parallel.pipeline_model_parallel_size": one.pipeline,
        "parallel.virtual_pipeline_model_parallel_size": one.virtual if one.virtual > 1 else "null",
        "parallel.pipeline_layout": one.pipeline_layout,
        "parallel.context_parallel_size": one.context,
        "parallel.data_parallel_size": "null",
        "parallel.overlap_grad_reduce": "true",
        "parallel.overlap_param_gather": str(work.shards_optimizer).lower(),
        "parallel.overlap_p2p_comm": "null",  # where stages are interleaved
        "parallel.tp_comm_overlap": str(has_userbuffers(work, one)).lower(),
        "training.micro_batch_size": one.micro_batch_size,
        "training.recompute": one.recompute,
        "training.precision": one.precision,
    }
    return [f"{name}={value}" for name, value in fields.items()]


def explained(work: Workload, planned: Planned, device: Device) -> list[tuple[str, str]]:
    """(what, how it comes about) line by line."""
    one, needed, step = planned.candidate, planned.memory, planned.step
    count = one.microbatches(work.global_batch_size)
    room = device.memory_bytes.value
    lines = [
        ("device", f"{device.name}; kernels at {device.kernel_share.value:.3f} of the best measured"),
        ("layout", f"{layout_words(one)}, {one.gpus:,} GPUs, {one.precision}, recompute {one.recompute}"),
        (
            "batch",
            f"{work.global_batch_size:,} sequences of {work.sequence_length:,}: {count} micro-batches of "
            f"{one.micro_batch_size} on {one.data} data-parallel ranks",
        ),
        ("overrides", " ".join(overrides(work, one))),
        ("", f"memory of pipeline rank {needed.stage}, which needs most"),
        *((name, f"{part.value / _GIB:8.2f} GiB = {part.text}") for name, part in needed.parts.items()),
        (
            "total",
            f"{needed.total / _GIB:8.2f} GiB, {needed.total / room:.0%} of {room / _GIB:.1f} GiB (limit "
            f"{MEMORY_SHARE:.0%})",
        ),
    ]
    for recompute in ("none", "selective", "full"):
        part = activations(work, one._replace(recompute=recompute), needed.stage)
        lines.append((f"activations, {recompute}", f"{part.value / _GIB:8.2f} GiB"))
    lines += [
        ("", "time of a step"),
        *((name, f"{1e3 * part.value:10.1f} ms = {part.text}") for name, part in step.parts.items()),
        ("step", f"{1e3 * step.seconds:10.1f} ms; bubble {step.bubble:.1%} of the pipeline"),
        ("sent by a rank", ", ".join(f"{name} {value / 1e9:,.2f} GB" for name, value in step.sent.items())),
        ("hidden", f"{step.hidden:.0%} of the time of all communication"),
        ("", "what comes of it"),
        (
            "FLOPs of a token",
            f"{work.flops_per_token / 1e9:,.2f} G = 3 x ({work.model.num_layers} layers x (2 x "
            f"{work.elements.linear:,} + 4 x {work.attended:,.0f} attended positions x "
            f"{work.model.num_attention_heads * work.model.head_dim:,}) + 2 x {work.masked_share:.4f} masked x "
            f"{work.model.hidden_size:,} x {work.model.vocab_size:,}); all pairs count, recomputation does not",
        ),
        ("tokens/s/GPU", f"{planned.tokens_per_second:,.0f}"),
        (
            "MFU",
            f"{planned.mfu:.1%} = {planned.model_flops / 1e12:,.0f} TFLOP/s of "
            f"{device.peak_flops(one.precision) / 1e12:,.0f} ({one.precision})",
        ),
        (
            "days",
            f"{planned.days:,.1f} for {work.train_tokens:,.0f} tokens, without failures",
        ),
    ]
    return lines


def as_json(work: Workload, planned: Planned, goodput: float) -> dict[str, Any]:
    """All figures: bytes, seconds, shares."""
    one = planned.candidate
    return {
        "gpus": one.gpus,
        "tensor_model_parallel_size": one.tensor,
        "pipeline_model_parallel_size": one.pipeline,
        "virtual_pipeline_model_parallel_size": one.virtual,
        "context_parallel_size": one.context,
        "data_parallel_size": one.data,
        "micro_batch_size": one.micro_batch_size,
        "num_microbatches": one.microbatches(work.global_batch_size),
        "pipeline_layout": one.pipeline_layout,
        "layers": one.split,
        "recompute": one.recompute,
        "precision": one.precision,
        "memory_bytes": {name: part.value for name, part in planned.memory.parts.items()},
        "memory_total_bytes": planned.memory.total,
        "memory_pipeline_rank": planned.memory.stage,
        "step_seconds": {name: part.value for name, part in planned.step.parts.items()},
        "sent_bytes": planned.step.sent,
        "bubble": planned.step.bubble,
        "hidden": planned.step.hidden,
        "tokens_per_second_per_gpu": planned.tokens_per_second,
        "model_flops_per_second_per_gpu": planned.model_flops,
        "mfu": planned.mfu,
        "days": planned.days,
        "goodput": goodput,
        "days_with_failures": planned.days / goodput,
    }

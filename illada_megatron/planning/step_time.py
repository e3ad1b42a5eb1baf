"""Time of a training step in a layout: the pipeline, the exchange of gradients and weights, the optimizer."""

from typing import NamedTuple

from illada_megatron.planning.device import Device
from illada_megatron.planning.layer_time import (
    Passes,
    Seconds,
    context_bytes,
    head_passes,
    layer_passes,
    tensor_bytes,
)
from illada_megatron.planning.memory import Part
from illada_megatron.planning.workload import Candidate, Workload, stage_elements

_BF16 = 2
_BUCKET = 40_000_000
"""megatron-core's ddp_bucket_size: 40 million parameters, or a million a data-parallel rank where that is more."""


class Step(NamedTuple):
    """Of all ranks alike: they wait for each other."""

    parts: dict[str, Part]
    """Seconds that add up to the step's."""
    sent: dict[str, float]
    """Bytes that a rank sends in a step, by what for: tensor, context, pipeline, gradients, weights."""
    bubble: float
    """Share of the pipeline's time in which a rank waits for its start and end."""
    hidden: float
    """Share of the time of all communication that runs behind computation."""

    @property
    def seconds(self) -> float:
        return sum(part.value for part in self.parts.values())


def step_time(work: Workload, candidate: Candidate, device: Device) -> Step:
    """With overlapped communication everywhere (docs/scaling.md)."""
    count, pipeline = candidate.microbatches(work.global_batch_size), candidate.pipeline
    layer, head = _layer(work, candidate, device), head_passes(work, candidate, device)
    layers = [sum(chunks) for chunks in candidate.split]
    first, last = _times(layers[0], layer), _plus(_times(layers[-1], layer), head)
    if pipeline == 1:
        first = last
    slowest = max(last, _times(max(layers), layer), key=lambda one: one.total)
    mean = (sum(layers) * layer.total + head.total) / pipeline
    fill = (pipeline - 1) / candidate.virtual * mean
    exchange = pipeline_exchange(work, candidate, device)
    gradient, weight = gradient_bytes(work, candidate, 0), gathered_bytes(work, candidate, 0)
    rate = group_rate(candidate, device)
    parts = {
        "compute": Part(
            count * slowest.total,
            "{} micro-batches x {:.2f} ms on the slowest stage ({})",
            (count, 1e3 * slowest.total, _pass_text(slowest)),
        ),
        "bubble": Part(
            fill,
            "(PP {} - 1) / {} chunks x {:.2f} ms of a stage on average",
            (pipeline, candidate.virtual, 1e3 * mean),
        ),
        "pipeline exchange": exchange,
        "gradient exchange": exposed(gradient / rate, first.backward.total, buckets(work, candidate), gradient, rate),
        "weight exchange": exposed(weight / rate, first.forward.total, buckets(work, candidate), weight, rate),
        "optimizer step": optimizer_seconds(work, candidate, device),
    }
    sent = _sent(work, candidate, gradient, weight)
    spent = sent["gradients"] / rate + sent["weights"] / rate + _model_parallel_seconds(candidate, device, sent)
    open_ = parts["gradient exchange"].value + parts["weight exchange"].value + exchange.value
    open_ += count * (slowest.forward.tensor + slowest.backward.tensor)
    open_ += count * (slowest.forward.context + slowest.backward.context)
    return Step(parts, sent, fill / (fill + count * slowest.total), max(0.0, 1 - open_ / spent) if spent else 1.0)


def _layer(work: Workload, candidate: Candidate, device: Device) -> Passes:
    """A layer's mean: with FP8 some stay bf16."""
    passes = layer_passes(work, candidate, device, candidate.precision)
    if candidate.precision != "fp8" or not work.fp8_bf16_layers:
        return passes
    part = min(work.fp8_bf16_layers / work.model.num_layers, 1.0)
    return _plus(_times(1 - part, passes), _times(part, layer_passes(work, candidate, device, "bf16")))


def _times(count: float, passes: Passes) -> Passes:
    return Passes(*(Seconds(*(count * part for part in one)) for one in passes))


def _plus(some: Passes, more: Passes) -> Passes:
    return Passes(
        *(Seconds(*(a + b for a, b in zip(one, other, strict=True))) for one, other in zip(some, more, strict=True))
    )


def _pass_text(passes: Passes) -> str:
    both = [1e3 * (one + other) for one, other in zip(*passes, strict=True)]
    return ", ".join(f"{name} {value:.2f}" for name, value in zip(Seconds._fields, both, strict=True))


def pipeline_bytes(work: Workload, candidate: Candidate) -> float:
    """Hidden states to the next stage and their gradients back, once a chunk: 2 VP t h / TP in bf16 a micro-batch."""
    if candidate.pipeline == 1:
        return 0.0
    tokens = candidate.tokens(work.sequence_length)
    return 2 * candidate.virtual * _BF16 * tokens * work.model.hidden_size / candidate.tensor


def pipeline_exchange(work: Workload, candidate: Candidate, device: Device) -> Part:
    """Interleaved, the exchange of a micro-batch runs beside the computation of another, but while the pipeline fills
    and empties; else it is waited for."""
    count, ranks = candidate.microbatches(work.global_batch_size), candidate.pipeline
    each = pipeline_bytes(work, candidate) / candidate.virtual / pipeline_rate(candidate, device)
    times = (ranks - 1 if candidate.virtual > 1 else count + ranks - 1) if ranks > 1 else 0
    return Part(times * each, "{} exchanges x {:.3f} ms, forward and backward", (times, 1e3 * each))


def pipeline_rate(candidate: Candidate, device: Device) -> float:
    """Neighbours are in one machine where the whole run is: pipeline ranks lie furthest apart (megatron-core's order
    tp-cp-dp-pp)."""
    near = candidate.gpus <= device.gpus_per_node
    return (device.node_bytes_per_second if near else device.network_bytes_per_second).value


def group_rate(candidate: Candidate, device: Device) -> float:
    """Bytes a second that a ring over the ranks with the same weights carries. Of one machine n = gpus_per_node / TP
    of them take part, and n network cards with them; NVLink is the limit above."""
    near = min(candidate.gradient_ranks, max(device.gpus_per_node // candidate.tensor, 1))
    inside = device.node_bytes_per_second.value
    if near == candidate.gradient_ranks:
        return inside
    return min(inside, near * device.network_bytes_per_second.value)


def gradient_bytes(work: Workload, candidate: Candidate, stage: int) -> float:
    """A rank's part of the reduce-scatter over n ranks: (n - 1) / n of its gradients."""
    total, ranks = stage_elements(work, candidate, stage).total, candidate.gradient_ranks
    return work.sent_gradient_bytes * total * (ranks - 1) / ranks


def gathered_bytes(work: Workload, candidate: Candidate, stage: int) -> float:
    """The same of the all-gather of the new weights: bf16, or FP8 for the layers' projections (fp8.param_gather)."""
    held, ranks = stage_elements(work, candidate, stage), candidate.gradient_ranks
    one = 1 if candidate.precision == "fp8" and work.fp8_param_gather else work.weight_bytes
    return (one * held.linear + work.weight_bytes * (held.rest + held.tables)) * (ranks - 1) / ranks


def buckets(work: Workload, candidate: Candidate) -> int:
    """Pieces in which the first stage's gradients and weights are exchanged; it is the last to finish."""
    size = max(_BUCKET, 1_000_000 * candidate.gradient_ranks)
    return max(1, round(stage_elements(work, candidate, 0).total / size))


def exposed(exchange: float, pass_: float, pieces: int, bytes_: float, rate: float) -> Part:
    """The exchange runs beside one micro-batch's pass (the last backward, the first forward), all but one piece."""
    return Part(
        max(exchange / pieces, exchange - pass_ * (1 - 1 / pieces)),
        "{:,.0f} B at {:,.0f} GB/s = {:.1f} ms, in {} pieces beside a pass of {:.1f} ms",
        (bytes_, rate / 1e9, 1e3 * exchange, pieces, 1e3 * pass_),
    )


def optimizer_seconds(work: Workload, candidate: Candidate, device: Device) -> Part:
    """Of a parameter: gradient read for the norm and again, main weight and moments read and written, weight written,
    divided over the ranks; the gradient buffer set to 0, and FP8 copies made of the new weights, undivided."""
    held = stage_elements(work, candidate, 0)
    ranks = candidate.gradient_ranks if work.shards_optimizer else 1
    each = 2 * work.gradient_bytes + 2 * work.master_bytes + 2 * work.average_bytes + work.weight_bytes
    bytes_ = held.total * (each / ranks + work.gradient_bytes)
    if candidate.precision == "fp8":
        bytes_ += 6 * held.linear  # largest value, read, two copies written
    rate = device.memory_rate
    return Part(bytes_ / rate, "{:,.0f} B at {:,.0f} GB/s", (bytes_, rate / 1e9))


def _sent(work: Workload, candidate: Candidate, gradient: float, weight: float) -> dict[str, float]:
    count = candidate.microbatches(work.global_batch_size)
    layers = max(sum(chunks) for chunks in candidate.split)
    forward, backward = (tensor_bytes(work, candidate, candidate.precision, way) for way in (False, True))
    again = 2 if candidate.recompute == "full" else 1
    return {
        "tensor": count * layers * (again * forward + backward),
        "context": count * layers * (2 + again) * context_bytes(work, candidate),
        "pipeline": count * pipeline_bytes(work, candidate),
        "gradients": gradient,
        "weights": weight,
    }


def _model_parallel_seconds(candidate: Candidate, device: Device, sent: dict[str, float]) -> float:
    near = candidate.tensor * candidate.context <= device.gpus_per_node
    inside, outside = device.node_bytes_per_second.value, device.network_bytes_per_second.value
    context = sent["context"] / (inside if near else outside)
    return sent["tensor"] / inside + context + sent["pipeline"] / pipeline_rate(candidate, device)

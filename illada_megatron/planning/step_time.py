"""Time of a training step in a layout: the pipeline, the exchange of gradients and weights, the optimizer."""

from typing import NamedTuple

from illada_megatron.planning.device import Device
from illada_megatron.planning.layer_time import (
    NOTHING,
    Passes,
    Seconds,
    context_bytes,
    head_passes,
    layer_passes,
    tensor_bytes,
)
from illada_megatron.planning.memory import Part
from illada_megatron.planning.workload import Candidate, Workload, bf16_split, stage_elements

_BF16 = 2
_BUCKET = 40_000_000
"""megatron-core's ddp_bucket_size: 40 million parameters, or a million a data-parallel rank (context parallel ranks are
not counted) where that is more."""


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
    stages = stage_passes(work, candidate, device)
    totals = [one.total for one in stages]
    longest = totals.index(max(totals))
    first, slowest, others = stages[0], stages[longest], sum(totals) - max(totals)
    fill = others / candidate.virtual
    exchange = pipeline_exchange(work, candidate, device)
    gradient, weight = gradient_bytes(work, candidate, 0), gathered_bytes(work, candidate, 0)
    sum_rate, rate = gradient_rate(work, candidate, device), group_rate(candidate, device)
    pieces, (cast, summed) = buckets(work, candidate), summing_bytes(work, candidate, 0)
    backward = first.backward.total + cast / device.memory_rate
    parts = {
        "compute": Part(
            count * slowest.total,
            "{} micro-batches x {:.2f} ms on the slowest stage, {} ({})",
            (count, 1e3 * slowest.total, longest, _pass_text(slowest)),
        ),
        "bubble": Part(
            fill,
            "{:.2f} ms of a micro-batch on the other {} stages / {} chunks",
            (1e3 * others, pipeline - 1, candidate.virtual),
        ),
        "pipeline exchange": exchange,
        "gradient exchange": exposed(gradient, sum_rate, backward, pieces),
        "gradient sums": Part(
            (cast + summed) / device.memory_rate,
            "{:,.0f} B to bf16 + {:,.0f} B added up, at {:,.0f} GB/s",
            (cast, summed, device.memory_rate / 1e9),
        ),
        "weight exchange": exposed(weight, rate, first.forward.total, pieces),
        "optimizer step": optimizer_seconds(work, candidate, device),
    }
    sent = _sent(work, candidate, longest, gradient, weight)
    spent = gradient / sum_rate + weight / rate + _model_parallel_seconds(candidate, device, sent)
    open_ = parts["gradient exchange"].value + parts["weight exchange"].value + exchange.value
    open_ += count * (slowest.forward.tensor + slowest.backward.tensor)
    open_ += count * (slowest.forward.context + slowest.backward.context)
    return Step(parts, sent, fill / (fill + count * slowest.total), max(0.0, 1 - open_ / spent) if spent else 1.0)


def stage_passes(work: Workload, candidate: Candidate, device: Device) -> list[Passes]:
    """Of a micro-batch on each pipeline rank: its own layers, those among them that stay bf16 in an FP8 run, and on the
    last the head."""
    counts = _layer_counts(work, candidate)
    layer = layer_passes(work, candidate, device, candidate.precision)
    bf16 = layer_passes(work, candidate, device, "bf16") if any(plain for _, plain in counts) else NOTHING
    passes = {both: _plus(_times(both[0], layer), _times(both[1], bf16)) for both in set(counts)}
    stages = [passes[both] for both in counts]
    stages[-1] = _plus(stages[-1], head_passes(work, candidate, device))
    return stages


def _layer_counts(work: Workload, candidate: Candidate) -> list[tuple[int, int]]:
    """Of each pipeline rank: (layers in the run's format, layers that stay bf16 in an FP8 run)."""
    pairs = zip(candidate.split, bf16_split(work, candidate), strict=True)
    return [(sum(chunks) - sum(plain), sum(plain)) for chunks, plain in pairs]


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
    near, inside = _near_ranks(candidate, device), device.node_bytes_per_second.value
    if near == candidate.gradient_ranks:
        return inside
    return min(inside, near * device.network_bytes_per_second.value)


def gradient_rate(work: Workload, candidate: Candidate, device: Device) -> float:
    """The same of the gradients. Where each rank adds up itself what all others send it (all_to_all_single), its bytes
    for the n - near ranks on other machines, of n - 1, go through its own network card."""
    ranks, near = candidate.gradient_ranks, _near_ranks(candidate, device)
    if not work.sums_gradients or near == ranks:
        return group_rate(candidate, device)
    card = device.network_bytes_per_second.value * (ranks - 1) / (ranks - near)
    return min(device.node_bytes_per_second.value, card)


def _near_ranks(candidate: Candidate, device: Device) -> int:
    """Of the ranks with the same weights, those in one machine."""
    return min(candidate.gradient_ranks, max(device.gpus_per_node // candidate.tensor, 1))


def gradient_bytes(work: Workload, candidate: Candidate, stage: int) -> float:
    """What a rank sends in the reduce-scatter over n ranks, a ring or each to each: (n - 1) / n of its gradients."""
    total, ranks = stage_elements(work, candidate, stage).total, candidate.gradient_ranks
    return work.sent_gradient_bytes * total * (ranks - 1) / ranks


def summing_bytes(work: Workload, candidate: Candidate, stage: int) -> tuple[float, float]:
    """What a rank's memory moves where it adds up gradients itself (`training/gradient_reduction.py`), before the
    exchange and behind it: each gradient read and written in what travels; all that was received read, and the sums of
    the rank's part written. The backward pass's stream does both, so that the first makes that pass longer, beside
    which earlier exchanges run, and nothing is left that hides the second."""
    ranks = candidate.gradient_ranks
    if not work.sums_gradients or ranks == 1:
        return 0.0, 0.0
    total, kept, sent = stage_elements(work, candidate, stage).total, work.gradient_bytes, work.sent_gradient_bytes
    return total * float(kept + sent), total * (sent + kept / ranks)


def gathered_bytes(work: Workload, candidate: Candidate, stage: int) -> float:
    """The same of the all-gather of the new weights: bf16, or FP8 for the layers' projections (fp8.param_gather)."""
    held, ranks = stage_elements(work, candidate, stage), candidate.gradient_ranks
    one = 1 if candidate.precision == "fp8" and work.fp8.param_gather else work.weight_bytes
    return (one * held.linear + work.weight_bytes * (held.rest + held.tables)) * (ranks - 1) / ranks


def buckets(work: Workload, candidate: Candidate) -> int:
    """Pieces in which the first stage's gradients and weights are exchanged; it is the last to finish."""
    size = max(_BUCKET, 1_000_000 * candidate.data)
    return max(1, round(stage_elements(work, candidate, 0).total / size))


def exposed(bytes_: float, rate: float, pass_: float, pieces: int) -> Part:
    """The exchange runs beside one micro-batch's pass (the last backward, the first forward), all but one piece."""
    exchange = bytes_ / rate
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


def _sent(work: Workload, candidate: Candidate, stage: int, gradient: float, weight: float) -> dict[str, float]:
    """By a rank of pipeline rank `stage`, but for gradients and weights, which are the first's. Recomputed in full, a
    layer's forward pass sends again; selectively, attention's ring."""
    count, way = candidate.microbatches(work.global_batch_size), candidate.recompute
    forwards, rings = 2 if way == "full" else 1, 1 if way == "none" else 2
    layers, plain = _layer_counts(work, candidate)[stage]
    tensor = 0.0
    for number, precision in ((layers, candidate.precision), (plain, "bf16")):
        forward, backward = (tensor_bytes(work, candidate, precision, way) for way in (False, True))
        tensor += number * (forwards * forward + backward)
    return {
        "tensor": count * tensor,
        "context": count * (layers + plain) * (rings + 2) * context_bytes(work, candidate),
        "pipeline": count * pipeline_bytes(work, candidate),
        "gradients": gradient,
        "weights": weight,
    }


def _model_parallel_seconds(candidate: Candidate, device: Device, sent: dict[str, float]) -> float:
    near = candidate.tensor * candidate.context <= device.gpus_per_node
    inside, outside = device.node_bytes_per_second.value, device.network_bytes_per_second.value
    context = sent["context"] / (inside if near else outside)
    return sent["tensor"] / inside + context + sent["pipeline"] / pipeline_rate(candidate, device)

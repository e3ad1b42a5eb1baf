"""All layouts of a run on a number of GPUs that fit into their memory, the fastest first."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from illada_megatron.config.communication import check_gradients
from illada_megatron.config.fp8 import check_fp8_layout
from illada_megatron.config.pipeline_split import expected_flops, split_layers
from illada_megatron.config.schema import ParallelConfig
from illada_megatron.planning.device import Device
from illada_megatron.planning.memory import Memory, memory, recomputed
from illada_megatron.planning.step_time import Step, step_time
from illada_megatron.planning.workload import Candidate, StageLayers, Workload, stage_layers

MEMORY_SHARE = 0.94
"""Of a GPU's memory, what a layout may fill: the allocator's holes and what the parts leave out take the rest. A
choice, not a measurement."""
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_RECOMPUTE = ("none", "selective", "full")


class Planned(NamedTuple):
    """A layout with what it takes."""

    candidate: Candidate
    memory: Memory
    step: Step
    tokens_per_second: float
    """A GPU."""
    model_flops: float
    """A second and GPU, without recomputation."""
    mfu: float
    """Of the device's peak in the number format of the layers' products."""
    days: float
    """Of the run's tokens, without failures."""


def search(work: Workload, gpus: int, device: Device, precisions: Sequence[str]) -> list[Planned]:
    """Layouts that fit, the fastest first; of equally fast ones that with the least memory. Each recomputes no more
    than it has to."""
    limit = MEMORY_SHARE * device.memory_bytes.value
    found = []
    for candidate in candidates(work, gpus, device, precisions):
        # one after another: what comes after the first that fits is not computed
        for way, needed in zip(_RECOMPUTE, recomputed(work, candidate, device, _RECOMPUTE), strict=False):
            if needed.total <= limit:
                found.append(planned(work, candidate._replace(recompute=way), device, needed))
                break
    return sorted(found, key=lambda one: (-one.tokens_per_second, one.memory.total))


def smallest(work: Workload, gpus: int, device: Device, precisions: Sequence[str]) -> tuple[Candidate, Memory] | None:
    """The layout that needs least memory, recomputed in full, and what that is; None: there is no layout at all."""
    all_ = (one._replace(recompute="full") for one in candidates(work, gpus, device, precisions))
    needed = ((one, memory(work, one, device)) for one in all_)
    return min(needed, key=lambda pair: pair[1].total, default=None)


def fp8_refusal(work: Workload, gpus: int, device: Device) -> str | None:
    """Why the first layout that bf16 has cannot have FP8, in the words of the configuration's own check; None where it
    can, or bf16 has no layout either."""
    first = next(candidates(work, gpus, device, ["bf16"]), None)
    return None if first is None else _fp8_problem(work, first)


def planned(work: Workload, candidate: Candidate, device: Device, needed: Memory | None = None) -> Planned:
    """One layout."""
    step = step_time(work, candidate, device)
    rate = work.global_batch_size * work.sequence_length / step.seconds / candidate.gpus
    flops = rate * work.flops_per_token
    return Planned(
        candidate,
        needed or memory(work, candidate, device),
        step,
        rate,
        flops,
        flops / device.peak_flops(candidate.precision),
        work.train_tokens / (rate * candidate.gpus * 86_400),
    )


def candidates(work: Workload, gpus: int, device: Device, precisions: Sequence[str]) -> Iterator[Candidate]:
    """Layouts that model, batch and device allow, whether they fit or not, none of them recomputed. Tensor parallel
    ranks stay in a machine, and are sequence parallel too."""
    for pipeline in _divisors(gpus):
        ways = _splits(work, pipeline)
        for tensor, context in _group_sizes(work, gpus // pipeline, device):
            for micro in _micro_batch_sizes(work, gpus // (tensor * pipeline * context), tensor, context):
                of_gpus = Candidate(gpus, tensor, pipeline, 1, context, micro, "none", "bf16", ())
                formats = [one for one in precisions if one != "fp8" or _fp8_problem(work, of_gpus) is None]
                for virtual, layout, split in ways:
                    one = of_gpus._replace(virtual=virtual, pipeline_layout=layout, split=split)
                    if virtual == 1 or _interleaves(work, one):
                        yield from (one._replace(precision=precision) for precision in formats)


def _group_sizes(work: Workload, ranks: int, device: Device) -> Iterator[tuple[int, int]]:
    """(tensor, context) parallel sizes on the ranks of a pipeline stage. Tensor: divisors of heads, groups, FFN and
    vocabulary; context: two chunks of a sequence a rank (config/layout.py)."""
    model = work.model
    sizes = (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size, model.padded_vocab_size)
    for tensor in _divisors(ranks):
        if tensor <= device.gpus_per_node and all(size % tensor == 0 for size in sizes):
            for context in _divisors(ranks // tensor):
                if context == 1 or work.sequence_length % (2 * context) == 0:
                    yield tensor, context


def _splits(work: Workload, pipeline: int) -> list[tuple[int, str, StageLayers]]:
    """(model chunks of a pipeline rank, parallel.pipeline_layout, layers of each): even, and auto where that is
    another."""
    flops = expected_flops(work.model, work.diffusion, work.sequence_length)
    found: list[tuple[int, str, StageLayers]] = []
    for virtual in _divisors(work.model.num_layers // pipeline if pipeline > 1 else 1):
        even = None
        for layout in ("even", "auto") if pipeline > 1 else ("even",):
            with suppress(ValueError):
                split = stage_layers(split_layers(work.model, pipeline, virtual, layout, flops))
                if split != even:
                    found.append((virtual, layout, split))
                even = split
    return found


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _micro_batch_sizes(work: Workload, data: int, tensor: int, context: int) -> list[int]:
    """Those of which the batch is whole micro-batches on every data-parallel rank, and whose tokens tensor parallel
    ranks can divide (with context parallelism they are padded to that)."""
    return [
        one
        for one in _MICRO_BATCHES
        if work.global_batch_size % (one * data) == 0 and (context > 1 or one * work.sequence_length % tensor == 0)
    ]


def _interleaves(work: Workload, one: Candidate) -> bool:
    """The schedule takes PP micro-batches at a time; two stages' are alike in length (config/layout.py)."""
    full = work.global_batch_size % (one.micro_batch_size * one.data * one.pipeline) == 0
    return full and not (one.pipeline == 2 and one.context > 1 and work.rows_differ)


def _fp8_problem(work: Workload, candidate: Candidate) -> str | None:
    """What a configuration with this layout is told; None: it is taken."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=candidate.tensor,
        pipeline_model_parallel_size=candidate.pipeline,
        context_parallel_size=candidate.context,
        sequence_parallel=candidate.tensor > 1,
        use_distributed_optimizer=work.shards_optimizer,
        overlap_grad_reduce=True,
        grad_reduce_in_bf16=work.sums_gradients,
    )
    try:
        check_fp8_layout(work.fp8, work.model, parallel, candidate.micro_batch_size, work.sequence_length)
        check_gradients(parallel, work.fp8.param_gather)
    except ValueError as error:
        return str(error)
    return None

"""All layouts of a run on a number of GPUs that fit into their memory, the fastest first."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from illada_megatron.planning.device import Device
from illada_megatron.planning.memory import Memory, memory
from illada_megatron.planning.step_time import Step, step_time
from illada_megatron.planning.workload import Candidate, Split, Workload, splits

MEMORY_SHARE = 0.94
"""Of a GPU's memory, what a layout may fill: the allocator's holes and what the parts leave out take the rest. A
choice, not a measurement."""
_FP8_MULTIPLE = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
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


def search(
    work: Workload, gpus: int, device: Device, precisions: Sequence[str], contexts: Sequence[int] | None = None
) -> list[Planned]:
    """Layouts that fit, the fastest first; of equally fast ones that with the least memory. Each recomputes no more
    than it has to.

    contexts: sizes of context parallelism; None: all.
    """
    limit = MEMORY_SHARE * device.memory_bytes.value
    found = []
    for candidate in candidates(work, gpus, device, precisions, contexts):
        for recompute in _RECOMPUTE:
            one = candidate._replace(recompute=recompute)
            needed = memory(work, one, device)
            if needed.total <= limit:
                found.append(planned(work, one, device, needed))
                break
    return sorted(found, key=lambda one: (-one.tokens_per_second, one.memory.total))


def smallest(work: Workload, gpus: int, device: Device, precisions: Sequence[str]) -> tuple[Candidate, Memory] | None:
    """The layout that needs least memory, recomputed in full, and what that is; None: there is no layout at all."""
    all_ = (one._replace(recompute="full") for one in candidates(work, gpus, device, precisions))
    needed = ((one, memory(work, one, device)) for one in all_)
    return min(needed, key=lambda pair: pair[1].total, default=None)


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


def candidates(
    work: Workload, gpus: int, device: Device, precisions: Sequence[str], contexts: Sequence[int] | None = None
) -> Iterator[Candidate]:
    """Layouts that model, batch and device allow, whether they fit or not, none of them recomputed. Tensor parallel
    ranks stay in a machine, and are sequence parallel too."""
    for tensor, pipeline, context in _group_sizes(work, gpus, device, contexts):
        data = gpus // (tensor * pipeline * context)
        for virtual, layout, split in _splits(work, pipeline):
            for micro in _micro_batch_sizes(work, data, pipeline if virtual > 1 else 1):
                for precision in precisions:
                    one = Candidate(gpus, tensor, pipeline, virtual, context, micro, "none", precision, split, layout)
                    if precision != "fp8" or _fp8_fits(work, one):
                        yield one


def _group_sizes(
    work: Workload, gpus: int, device: Device, contexts: Sequence[int] | None
) -> Iterator[tuple[int, int, int]]:
    """(tensor, pipeline, context) parallel sizes."""
    for tensor in _tensor_sizes(work, gpus, device):
        for pipeline in _divisors(gpus // tensor):
            for context in _divisors(gpus // (tensor * pipeline)):
                if (contexts is None or context in contexts) and _context_fits(work, tensor, context):
                    yield tensor, pipeline, context


def _splits(work: Workload, pipeline: int) -> list[tuple[int, str, Split]]:
    """(model chunks of a pipeline rank, parallel.pipeline_layout, layers of each)."""
    if pipeline not in work.splits:
        most = work.model.num_layers // pipeline if pipeline > 1 else 1
        work.splits[pipeline] = [
            (virtual, layout, split) for virtual in _divisors(most) for layout, split in splits(work, pipeline, virtual)
        ]
    return work.splits[pipeline]


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _tensor_sizes(work: Workload, gpus: int, device: Device) -> list[int]:
    """Divisors of heads, groups, FFN and vocabulary, as config/layout.py asks for."""
    model, near = work.model, min(gpus, device.gpus_per_node)
    sizes = (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size, model.padded_vocab_size)
    return [one for one in _divisors(near) if gpus % one == 0 and all(size % one == 0 for size in sizes)]


def _context_fits(work: Workload, tensor: int, context: int) -> bool:
    """2 CP chunks of a sequence, and their tokens divided over tensor parallel ranks."""
    return work.sequence_length % (2 * context if context > 1 else 1) == 0 and (
        work.sequence_length // context % tensor == 0
    )


def _micro_batch_sizes(work: Workload, data: int, multiple: int) -> list[int]:
    """Those of which the batch is whole micro-batches on every rank, `multiple` of them at a time."""
    return [one for one in _MICRO_BATCHES if work.global_batch_size % (one * data * multiple) == 0]


def _fp8_fits(work: Workload, candidate: Candidate) -> bool:
    """Tokens and features of a rank are multiples of the recipe's tile."""
    model, tile, ranks = work.model, _FP8_MULTIPLE[work.fp8_recipe], candidate.tensor
    features = (model.hidden_size, model.num_attention_heads * model.head_dim // ranks, model.ffn_hidden_size // ranks)
    tokens = candidate.tokens(work.sequence_length) // ranks
    return all(size % tile == 0 for size in (*features, tokens))

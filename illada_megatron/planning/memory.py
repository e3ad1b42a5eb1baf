"""Memory of a GPU in a layout, part by part: what megatron-core and Transformer Engine allocate.

Weights, gradients and the optimizer are compared with the built stages in tests/planning/test_memory_model.py, and of
the activations what local layers keep too. What only a GPU has (the rest of Transformer Engine's activations, buffers
of NCCL and of userbuffers) follows the sources that are named, and was not measured.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from illada_megatron.config.schema import ModelConfig
from illada_megatron.planning.device import Device
from illada_megatron.planning.workload import Candidate, Workload, bf16_split, has_userbuffers, stage_elements

_BF16, _FP32 = 2, 4
_MXFP8_SCALES = 1 / 32
# Of a communicator: NCCL_BUFFSIZE is 4 MiB a channel and direction (NCCL's documentation); 24 channels were seen on
# H100s with NVLink (github.com/NVIDIA/nccl/issues/1161).
_NCCL_COMMUNICATOR_BYTES = 24 * 2 * 4 * 2**20
# cuBLAS's workspace of 32 MiB on Hopper, once for torch and once for each of Transformer Engine's four streams (its
# module/base.py: get_cublas_workspace_size_bytes, get_multi_stream_cublas_workspace).
_CUBLAS_BYTES = 5 * 32 * 2**20
# CUDA's context and the kernels of torch, NCCL, cuDNN and Transformer Engine. An estimate.
_CONTEXT_BYTES = 1.0 * 2**30
# Userbuffers of a whole micro-batch, one for each of a layer's 12 products, as they gather or reduce and scatter by
# default (module/base.py, initialize_ub, of Transformer Engine 2.11.0 and 2.20.2).
_GATHERING, _SCATTERING = 8, 4
_GPU_LOGITS_SHARE = 0.02
"""ops/masked_linear_cross_entropy.py: of a GPU's memory, the logits that exist at a time."""


class Part(NamedTuple):
    """Bytes, or seconds, and the line that says how they come about."""

    value: float
    formula: str
    """With fields of str.format..."""
    inputs: tuple[float | str, ...] = ()
    """...and what goes into them, so that nothing is written that nobody reads."""

    @property
    def text(self) -> str:
        return self.formula.format(*self.inputs)


class Memory(NamedTuple):
    """Of the pipeline stage that needs most."""

    stage: int
    parts: dict[str, Part]

    @property
    def total(self) -> float:
        return sum(part.value for part in self.parts.values())


def memory(work: Workload, candidate: Candidate, device: Device) -> Memory:
    """Of the stage that needs most."""
    (needed,) = recomputed(work, candidate, device, [candidate.recompute])
    return needed


def recomputed(work: Workload, candidate: Candidate, device: Device, ways: Iterable[str]) -> Iterator[Memory]:
    """The same with each of `ways` to recompute, which most parts have nothing to do with."""
    stages = [
        Memory(stage, stage_memory(work, candidate, stage, device)) for stage in _distinct_stages(work, candidate)
    ]
    for way in ways:
        one = candidate._replace(recompute=way)
        backward = backward_memory(work, one)
        for stage, parts in stages:
            parts |= {"activations": activations(work, one, stage), "backward": backward}
        most = max(stages, key=lambda needed: needed.total)
        yield Memory(most.stage, dict(most.parts))


def _distinct_stages(work: Workload, candidate: Candidate) -> list[int]:
    """All that can need most: the first has the embedding, the last the head; of others with the same layers the first
    holds most micro-batches."""
    alike: dict[tuple[tuple[int, ...], ...], int] = {}
    for stage, layers in enumerate(zip(candidate.split, bf16_split(work, candidate), strict=True)):
        alike.setdefault(layers, stage)
    return sorted({*alike.values(), 0, candidate.pipeline - 1})


def stage_memory(work: Workload, candidate: Candidate, stage: int, device: Device) -> dict[str, Part]:
    """Of pipeline rank `stage`, what stays the same however much is recomputed."""
    return {
        "weights": weights(work, candidate, stage, device),
        "gradients": gradients(work, candidate, stage),
        "optimizer": optimizer(work, candidate, stage),
        "loss": loss_memory(work, candidate, stage, device),
        "buffers": buffers(work, candidate),
    }


def weights(work: Workload, candidate: Candidate, stage: int, device: Device) -> Part:
    """bf16, and what FP8 keeps of the layers' projections: beside bf16 or instead of it (fp8.param_gather)."""
    held = stage_elements(work, candidate, stage)
    plain = work.weight_bytes
    if candidate.precision != "fp8":
        return Part(plain * held.total, "{} B x {:,} parameters", (plain, held.total))
    mxfp8 = work.fp8.recipe == "mxfp8"
    copies = 2 * (1 + _MXFP8_SCALES) if mxfp8 else device.fp8_weight_copies
    linear = copies if work.fp8.param_gather else plain + copies
    return Part(
        plain * (held.rest + held.tables) + linear * held.linear,
        "{} B x {:,} parameters of tables, norms, bf16 layers + {:g} B x {:,} of FP8 layers' projections (FP8: {:g} B)",
        (plain, held.rest + held.tables, linear, held.linear, copies),
    )


def gradients(work: Workload, candidate: Candidate, stage: int) -> Part:
    """megatron-core's buffer: the whole of the rank's parameters, not divided (ZeRO-1).

    Gradients that the ranks add up themselves besides as they were sent and as they were received, of all buckets until
    the exchanges are waited for at the step's end (`training/gradient_reduction.py`): at most, for the last
    micro-batch's activations go meanwhile.
    """
    total = stage_elements(work, candidate, stage).total
    if not work.sums_gradients or candidate.gradient_ranks == 1:
        return Part(work.gradient_bytes * total, "{} B x {:,} parameters", (work.gradient_bytes, total))
    both = 2 * work.sent_gradient_bytes
    return Part(
        (work.gradient_bytes + both) * total,
        "({} B + {} B sent and received) x {:,} parameters",
        (work.gradient_bytes, both, total),
    )


def optimizer(work: Workload, candidate: Candidate, stage: int) -> Part:
    """fp32 main weights, Adam's moments and the moving average, divided over the ranks with the same weights."""
    total = stage_elements(work, candidate, stage).total
    ranks = candidate.gradient_ranks if work.shards_optimizer else 1
    each = work.master_bytes + work.average_bytes
    return Part(each * total / ranks, "{} B x {:,} parameters / {} ranks", (each, total, ranks))


def layer_bytes(model: ModelConfig, tensor: int, precision: str, recompute: str = "none") -> float:
    """Bytes a token that a Transformer Engine layer keeps for its backward pass; sequence parallelism where tensor > 1.

    Two norms' inputs and results (LayerNormLinear keeps `inputmat` and `ln_out`) and 4 bytes each for their scale;
    queries, keys, values; attention's result and a fp32 number a head; gate and up; the last projection's input. FP8
    keeps what goes into a product in 1 byte, attention's result in bf16 besides. Selective recomputation repeats
    attention's core, of which flash attention keeps nothing but the number a head; full keeps the layer's input.
    """
    hidden, heads, groups, dim = model.hidden_size, model.num_attention_heads, model.num_query_groups, model.head_dim
    ffn, one = model.ffn_hidden_size, 1 if precision == "fp8" else _BF16
    if recompute == "full":
        return _BF16 * hidden / tensor
    norms = 2 * (_BF16 * hidden + one * hidden + _FP32)
    attention = _BF16 * (2 * heads + 2 * groups) * dim + (one * heads * dim if precision == "fp8" else 0)
    statistics = 0 if recompute == "selective" else _FP32 * heads
    again = _BF16 * (heads + 2 * groups) * dim if model.qk_layernorm else 0
    return (norms + attention + again + statistics + (2 * _BF16 + one) * ffn) / tensor


def layers_in_flight(candidate: Candidate, stage: int, microbatches: int, chunks: Sequence[int]) -> int:
    """Layers times micro-batches whose activations a stage keeps at a time, at most. chunks: of each model chunk, the
    layers that count.

    1F1B: PP - stage micro-batches (arXiv 2104.04473, section 2.2). Interleaved: 2 (PP - stage - 1) + (VP - 1) PP + 1
    chunk passes, which go through the chunks PP micro-batches at a time (megatron-core's schedules.py,
    get_pp_rank_microbatches).
    """
    pipeline, virtual = candidate.pipeline, candidate.virtual
    if virtual == 1:
        return min(pipeline - stage, microbatches) * chunks[0]
    passes = min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, microbatches * virtual)
    rounds, left = divmod(passes, pipeline * virtual)
    whole = rounds * pipeline * sum(chunks)
    return whole + sum(min(max(left - chunk * pipeline, 0), pipeline) * layers for chunk, layers in enumerate(chunks))


def activations(work: Workload, candidate: Candidate, stage: int) -> Part:
    """What the forward passes keep until their backward passes."""
    tokens = candidate.tokens(work.sequence_length)
    each = layer_bytes(work.model, candidate.tensor, candidate.precision, candidate.recompute)
    microbatches = candidate.microbatches(work.global_batch_size)
    count = layers_in_flight(candidate, stage, microbatches, candidate.split[stage])
    in_bf16 = bf16_split(work, candidate)[stage]
    if not any(in_bf16):
        return Part(
            tokens * each * count,
            "{:,} tokens x {:,.0f} B a layer x {} layers in flight (recompute {})",
            (tokens, each, count, candidate.recompute),
        )
    plain = layer_bytes(work.model, candidate.tensor, "bf16", candidate.recompute)
    bf16 = layers_in_flight(candidate, stage, microbatches, in_bf16)
    return Part(
        tokens * (each * (count - bf16) + plain * bf16),
        "{:,} tokens x ({:,.0f} B a layer x {} layers in flight + {:,.0f} B x {} that stay bf16) (recompute {})",
        (tokens, each, count - bf16, plain, bf16, candidate.recompute),
    )


def backward_memory(work: Workload, candidate: Candidate) -> Part:
    """One layer's backward pass: gradients of gate and up and of their product, and what sequence parallelism has
    gathered (the input, its gradient). With full recomputation its activations too, made again."""
    model, tokens = work.model, candidate.tokens(work.sequence_length)
    gradients_ = _BF16 * 3 * model.ffn_hidden_size / candidate.tensor + 2 * _BF16 * model.hidden_size
    again = layer_bytes(model, candidate.tensor, candidate.precision) if candidate.recompute == "full" else 0.0
    return Part(
        tokens * (gradients_ + again),
        "{:,} tokens x ({:,.0f} B of one layer's gradients + {:,.0f} B made again)",
        (tokens, gradients_, again),
    )


def loss_memory(work: Workload, candidate: Candidate, stage: int, device: Device) -> Part:
    """On the last stage: hidden states of the masked rows and their gradients, all tokens at worst (t = 1), and the
    logits that exist at a time. Full logits never do (docs/masked_loss.md)."""
    if stage != candidate.pipeline - 1:
        return Part(0.0, "on the last stage only")
    model, tokens = work.model, candidate.tokens(work.sequence_length)
    allowed = work.logits_bytes or _GPU_LOGITS_SHARE * device.memory_bytes.value
    logits = min(allowed, _BF16 * tokens * model.padded_vocab_size / candidate.tensor)
    rows = 2 * _BF16 * tokens * model.hidden_size
    return Part(
        rows + logits,
        "2 x 2 B x {:,} rows x {:,} + {:,.0f} B of logits",
        (tokens, model.hidden_size, logits),
    )


def communicators(work: Workload, candidate: Candidate) -> int:
    """NCCL communicators that a rank has buffers for: the world's, and tensor, context, data (with context) parallel
    groups, pipeline neighbours and the tied embedding's, where they have several ranks; Transformer Engine's by which
    userbuffers find each other, the world's again and a tensor parallel group's (`module/base.py`,
    initialize_ub); and the stage's in which delayed scaling finds its largest values."""
    if candidate.gpus == 1:
        return 0
    pipeline, users = candidate.pipeline > 1, has_userbuffers(work, candidate)
    delayed = candidate.precision == "fp8" and work.fp8.recipe == "delayed"
    several = (
        *(candidate.tensor > 1, candidate.context > 1, candidate.gradient_ranks > 1, pipeline, pipeline),
        *(users, users and candidate.gpus > candidate.tensor),
        delayed and candidate.tensor * candidate.gradient_ranks > 1,
    )
    return 1 + sum(several)


def userbuffer_bytes(work: Workload, candidate: Candidate) -> int:
    """What Transformer Engine is asked for in `model/userbuffers.py`: a set in bf16; in an FP8 run a set whose gathered
    micro-batches are FP8, and the one in bf16 besides where layers stay bf16."""
    if not has_userbuffers(work, candidate):
        return 0
    bf16, fp8 = _BF16 * (_GATHERING + _SCATTERING), _GATHERING + _BF16 * _SCATTERING
    each = bf16 if candidate.precision != "fp8" else fp8 + bf16 * any(work.fp8.bf16_layers)
    return each * candidate.tokens(work.sequence_length) * work.model.hidden_size


def buffers(work: Workload, candidate: Candidate) -> Part:
    """CUDA's context, cuBLAS's workspaces, NCCL's buffers, userbuffers of overlapped tensor parallel communication."""
    count, users = communicators(work, candidate), userbuffer_bytes(work, candidate)
    return Part(
        _CONTEXT_BYTES + _CUBLAS_BYTES + count * _NCCL_COMMUNICATOR_BYTES + users,
        "context {:,.0f} B + cuBLAS {:,} B + {} communicators x {:,} B + userbuffers {:,} B",
        (_CONTEXT_BYTES, _CUBLAS_BYTES, count, _NCCL_COMMUNICATOR_BYTES, users),
    )

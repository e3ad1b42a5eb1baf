"""Time of one layer, and of the head, for one micro-batch on one rank, forward and backward.

Every kernel is taken to reach one share of the best that its kind was measured at: `kernel_share` of the device's
file, the only number that is fitted, to one published row (benchmarks/planning/published.py). Communication runs at the
bandwidths that NCCL was measured at.

Sizes: t tokens of a rank's micro-batch, h hidden, f FFN, q query and g KV heads of d, s sequence, TP and CP ranks.
"""

from typing import NamedTuple

from illada_megatron.planning.device import Device
from illada_megatron.planning.workload import Candidate, Workload

_BF16 = 2
_ATTENTION_BACKWARD = 2.5
"""Products of flash attention's backward pass over those of its forward pass: five instead of two (it makes the scores
again)."""
_ATTENTION_HALF = 150
"""Keys at which attention has half its speed: with n keys n / (n + 150) of it. FlashAttention-3's forward pass on H100
has 467, 565, 625, 638, 646 and 648 TFLOP/s with 512, 1k, 2k, 4k, 8k and 16k (arXiv 2407.08608, figure 5)."""
_QUANTISE_BYTES = {"tensorwise": 6, "delayed": 4, "blockwise": 6, "mxfp8": 4}
"""Bytes moved to quantise an element: read bf16, write it twice in FP8 (rows, and columns for the weight gradient);
tensorwise and blockwise read it once more for the largest value."""


class Seconds(NamedTuple):
    """Of a pass through a layer."""

    products: float
    attention: float
    elementwise: float
    """Norms, residuals, rotation, SwiGLU, quantisation: bound by memory."""
    tensor: float
    """Tensor parallel communication."""
    context: float
    """Context parallel communication that attention does not hide."""

    @property
    def total(self) -> float:
        return sum(self)


class Passes(NamedTuple):
    """Of a layer or the head; backward with what recomputation repeats."""

    forward: Seconds
    backward: Seconds

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total


NOTHING = Passes(Seconds(0, 0, 0, 0, 0), Seconds(0, 0, 0, 0, 0))


def layer_passes(work: Workload, candidate: Candidate, device: Device, precision: str) -> Passes:
    """Of one layer whose products are in `precision`."""
    product = product_seconds(work, candidate, device, precision)
    attend = attention_seconds(work, candidate, device)
    ring = context_seconds(work, candidate, device)
    forward = Seconds(
        product,
        attend,
        elementwise_seconds(work, candidate, device, precision, backward=False),
        tensor_seconds(work, candidate, device, precision, backward=False),
        exposed_context(attend, ring, candidate.context),
    )
    backward = Seconds(
        2 * product,
        _ATTENTION_BACKWARD * attend,
        elementwise_seconds(work, candidate, device, precision, backward=True),
        tensor_seconds(work, candidate, device, precision, backward=True),
        exposed_context(_ATTENTION_BACKWARD * attend, 2 * ring, candidate.context),  # and their gradients
    )
    return Passes(forward, _with_recomputation(forward, backward, candidate.recompute))


def _with_recomputation(forward: Seconds, backward: Seconds, recompute: str) -> Seconds:
    """full: the layer's forward pass comes again; selective: attention's."""
    if recompute == "full":
        return Seconds(*(one + again for one, again in zip(backward, forward, strict=True)))
    if recompute == "selective":
        return backward._replace(
            attention=backward.attention + forward.attention, context=backward.context + forward.context
        )
    return backward


def product_seconds(work: Workload, candidate: Candidate, device: Device, precision: str) -> float:
    """Forward: 2 t (2 h d (q + g) + 3 h f) / TP products and sums."""
    tokens = candidate.tokens(work.sequence_length)
    flops = 2 * tokens * work.elements.linear / candidate.tensor
    return flops / (device.product_flops(precision) * device.kernel_share.value)


def attention_seconds(work: Workload, candidate: Candidate, device: Device) -> float:
    """Forward: 4 t a q d / TP, a the positions that a token attends to. bf16 in every recipe. Context parallel ranks
    attend to s / CP keys at a time, and short pieces are slow."""
    model, tokens = work.model, candidate.tokens(work.sequence_length)
    flops = 4 * tokens * work.attended * model.num_attention_heads * model.head_dim / candidate.tensor
    piece = work.sequence_length / candidate.context
    return flops / (device.attention_flops.value * device.kernel_share.value) * (1 + _ATTENTION_HALF / piece)


def elementwise_bytes(work: Workload, candidate: Candidate, precision: str, backward: bool) -> float:
    """What the kernels between the products read and write, in bf16.

    Forward: two norms (read, write h), two residuals (read 2 h, write h), rotation of q and k, SwiGLU (2 f -> f).
    Backward: two norms (read input and gradient, write h), two sums of gradients (read 2 h, write h), rotation back,
    SwiGLU (f and 2 f -> 2 f). FP8: the inputs of the four projections (2 h, q d, f), backward the gradients of their
    results ((q + 2 g) d, 2 f, 2 h). Backward besides, of each weight: the sum of its gradients, read and written.
    """
    model, tokens = work.model, candidate.tokens(work.sequence_length)
    heads, groups = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    if backward:
        moved, quantised = 2 * (3 + 3) * hidden + 2 * (heads + groups) + 5 * ffn, heads + 2 * groups + 2 * ffn
    else:
        moved, quantised = 2 * (2 + 3) * hidden + 2 * (heads + groups) + 3 * ffn, heads + ffn
    bytes_ = _BF16 * moved
    if precision == "fp8":
        bytes_ += _QUANTISE_BYTES[work.fp8.recipe] * (quantised + 2 * hidden)
    summed = 2 * work.gradient_bytes * work.elements.linear if backward else 0
    return (tokens * bytes_ + summed) / candidate.tensor


def elementwise_seconds(work: Workload, candidate: Candidate, device: Device, precision: str, backward: bool) -> float:
    """At the memory's speed."""
    return elementwise_bytes(work, candidate, precision, backward) / device.memory_rate


def tensor_bytes(work: Workload, candidate: Candidate, precision: str, backward: bool) -> float:
    """What a rank sends with sequence parallelism: t h (TP - 1) / TP a gather or scatter. Forward: two of each;
    backward: two of each, and the two gathered inputs again for the weight gradients. FP8 gathers 1 byte."""
    ranks, tokens = candidate.tensor, candidate.tokens(work.sequence_length)
    gathers, scatters = (4, 2) if backward else (2, 2)
    gathered = 1 if precision == "fp8" else _BF16
    return tokens * work.model.hidden_size * (gathers * gathered + scatters * _BF16) * (ranks - 1) / ranks


def tensor_seconds(work: Workload, candidate: Candidate, device: Device, precision: str, backward: bool) -> float:
    """Within a machine. None of it is counted as hidden, although userbuffers take it behind the products: these are
    cut for that and share the chip with it, and published runs with TP8 are slower still (docs/scaling.md)."""
    return tensor_bytes(work, candidate, precision, backward) / device.node_bytes_per_second.value


def context_bytes(work: Workload, candidate: Candidate) -> float:
    """Keys and values of the other ranks, once round the ring: (CP - 1) 2 g d t / TP in bf16."""
    model, tokens = work.model, candidate.tokens(work.sequence_length)
    return (candidate.context - 1) * _BF16 * 2 * model.num_query_groups * model.head_dim * tokens / candidate.tensor


def context_seconds(work: Workload, candidate: Candidate, device: Device) -> float:
    """Forward. The ring's neighbours are in one machine where TP * CP ranks are."""
    near = candidate.tensor * candidate.context <= device.gpus_per_node
    rate = device.node_bytes_per_second if near else device.network_bytes_per_second
    return context_bytes(work, candidate) / rate.value


def exposed_context(attend: float, communication: float, ranks: int) -> float:
    """A rank attends to one part of keys and values while the next comes; the last part hides nothing."""
    return max(0.0, communication - attend * (1 - 1 / ranks))


def head_passes(work: Workload, candidate: Candidate, device: Device) -> Passes:
    """The masked loss, forward and backward in one (docs/masked_loss.md): 6 m h v / TP in bf16, and the logits written
    and read once in each sweep; m masked tokens, v the padded vocabulary."""
    model = work.model
    rows = candidate.tokens(work.sequence_length) * work.masked_share
    logits = rows * model.padded_vocab_size / candidate.tensor
    products = 6 * logits * model.hidden_size / (device.product_flops("bf16") * device.kernel_share.value)
    moved = 4 * _BF16 * logits / device.memory_rate
    return Passes(Seconds(products, 0.0, moved, 0.0, 0.0), NOTHING.backward)

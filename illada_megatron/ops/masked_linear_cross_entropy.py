"""Cross-entropy of the masked tokens straight from hidden states: the logits of unmasked tokens never exist, those of
masked tokens a chunk at a time.

The objective of a masked-diffusion language model (arXiv 2502.09992, equation 3) is

    sum over masked i of  w_i * CE(hidden_i @ weight^T, label_i),        w_i = 1 / p

so the head is applied to masked rows only. With the head's rows cut over a tensor-parallel group each rank holds the
logits of its own vocabulary range, and three numbers a row (maximum, sum of exponentials, label's logit) are exchanged.
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from illada_megatron.ops import kernels
from illada_megatron.ops.loss_operators import Rows, Settings, apply
from illada_megatron.ops.masked_rows import MaskedRows

Implementation = Literal["auto", "reference", "fused"]

# What the logits of a chunk may take by default. CPU: 256 rows of iLLaDA's vocabulary, where the speed of the
# products levels off (benchmarks/README.md). GPU: a share of its memory, 5,000 such rows on 80 GB; each chunk
# rewrites the weight's gradient, which small chunks would do too often.
_CPU_CHUNK_LOGITS = 40_000_000
_GPU_CHUNK_SHARE = 0.02


class MaskedLoss(NamedTuple):
    """What the training step and its metrics need of a batch. fp64 instead of fp32 where the inputs are fp64."""

    loss_sum: Tensor  # scalar fp32, differentiable: sum_i w_i (CE_i + z_loss (log Z_i)^2); the same on all ranks
    weighted_cross_entropy: Tensor  # scalar fp32, detached: sum_i w_i CE_i in nats
    cross_entropy: Tensor  # [m] fp32, detached, CE of each masked row in nats
    rows: Tensor  # [m] int64, positions of the masked rows in the flattened tokens, ascending


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weight: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    implementation: Implementation = "auto",
    chunk_memory_bytes: int | None = None,
    z_loss: float = 0.0,
    logit_softcap: float = 0.0,
    excluded_id: int | None = None,
    main_grad: Tensor | None = None,
    grad_scale: float | None = None,
    masked: MaskedRows | None = None,
) -> MaskedLoss:
    """Weighted cross-entropy of the rows whose `loss_weight` is not 0.

    The gradients are made in the forward pass; the backward pass only scales them.

    Args:
        hidden: `[n, h]` final hidden states; with `sequence_parallel` this rank's slice of them, `[n/tp, h]`.
        weight: `[v_padded/tp, h]`, this rank's consecutive rows of the output (or tied) embedding; hidden's dtype.
        labels: `[n]` int64, ids in the whole vocabulary; read at masked rows only.
        loss_weight: `[n]` float32, 1/p at masked rows, 0 elsewhere; the same on every rank of the group.
        vocab_size: real size of the vocabulary. Rows of the head from there on are padding: they take no part in the
            softmax and get zero gradient, so the result does not depend on how much padding a layout needs.
        tp_group: the tensor-parallel group; None: the head is whole.
        sequence_parallel: hidden is cut along n over the group.
        implementation: "reference" (torch operations, any device and floating dtype), "fused" (compiled passes over
            the logits; fp32, bf16, fp16) or "auto" (fused where it can run; `chosen_implementation` says which).
        chunk_memory_bytes: what the logits that exist at a time may take (at least 32 rows are); None: 40 million
            logits on a CPU (80 MB in bf16), 2 % of the memory of a GPU.
        z_loss: c of the penalty w_i c (log Z_i)^2 (arXiv 2204.02311, section 5).
        logit_softcap: logits become s tanh(logit / s); 0: they stay.
        excluded_id: a token whose logit is minus infinity: it takes no part in the softmax, and its row of the head
            gets zero gradient, as padding does. No masked row may have it as its label. None: there is none.
        main_grad: `[v_padded/tp, h]` float32. The weight's gradient is added to it, in fp32 and at once, and weight
            gets none from autograd: what Megatron calls gradient accumulation fusion.
        grad_scale: with main_grad, the gradient that backward will bring for loss_sum. It is checked then.
        masked: the rows, from `MaskedRows.locate` with the same loss_weight, tp_group and sequence_parallel, whose
            labels were checked where they were read. None: both is done here, for which a GPU makes the host wait.

    Returns:
        `MaskedLoss`. Statistics are fp32 (fp64 for fp64 inputs). Gradients come back in the inputs' dtype: hidden's is
        summed over the group, weight's belongs to this rank's rows. With no masked row the loss is 0, the gradients
        are zero and the graph is still connected. The same inputs give the same bits.

    Raises:
        TypeError: a dtype differs from the above.
        ValueError: shapes or devices disagree, the head has fewer rows than vocab_size, a masked row's label is
            outside [0, vocab_size) or the excluded one, a number is out of its range, or `masked` is of another layout.
        RuntimeError: "fused" cannot run here; in backward: another gradient than grad_scale arrives.
    """
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    tp, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    _check_tensors(hidden, weight, labels, loss_weight)
    _check_sizes(hidden, weight, labels, loss_weight, vocab_size, tp if sequence_parallel else 1, tp)
    _check_options(weight, chunk_memory_bytes, z_loss, logit_softcap, main_grad, grad_scale)
    use_fused = chosen_implementation(implementation, hidden.device, hidden.dtype)[0] == "fused"

    if masked is None:
        masked = MaskedRows.locate(loss_weight, group, sequence_parallel)
        row_labels = labels.index_select(0, masked.rows)
        _check_labels(row_labels, masked.rows, vocab_size, excluded_id)
    else:
        _check_layout(masked, group, sequence_parallel)
        row_labels = labels.index_select(0, masked.rows)
    first_id = rank * weight.shape[0]
    real_rows = min(max(vocab_size - first_id, 0), weight.shape[0])
    excluded_here = excluded_id is not None and first_id <= excluded_id < first_id + real_rows
    rows = Rows(masked.gather(hidden), weight, row_labels - first_id, loss_weight.index_select(0, masked.rows))
    settings = Settings(
        real_rows,
        z_loss,
        logit_softcap,
        _chunk_bytes(hidden) if chunk_memory_bytes is None else chunk_memory_bytes,
        use_fused,
        None if group is None else group.group_name,
        excluded_id - first_id if excluded_id is not None and excluded_here else None,
    )
    loss_sum, cross_entropy = apply(rows, settings, main_grad, grad_scale)
    weighted = torch.dot(rows.row_weight.to(cross_entropy.dtype), cross_entropy)
    return MaskedLoss(loss_sum, weighted, cross_entropy, masked.rows)


def chosen_implementation(
    wanted: Implementation, device: torch.device, dtype: torch.dtype
) -> tuple[Literal["reference", "fused"], str]:
    """What computes on tensors of `device` and `dtype`, and why where it is the reference ("" otherwise).

    Raises ValueError for an unknown name, RuntimeError where "fused" is asked for and cannot run.
    """
    if wanted not in ("auto", "reference", "fused"):
        raise ValueError(f"implementation must be auto, reference or fused, found {wanted!r}")
    if wanted == "reference":
        return "reference", "asked for"
    reason = kernels.missing("logit_statistics", device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = f"the fused passes take float32, bfloat16 and float16, found {dtype}"
    if reason is None:
        return "fused", ""
    if wanted == "fused":
        raise RuntimeError(f"the fused masked loss cannot run on {device}: {reason}; use auto or reference")
    return "reference", reason


def _chunk_bytes(hidden: Tensor) -> int:
    if hidden.is_cuda:
        return int(_GPU_CHUNK_SHARE * torch.cuda.get_device_properties(hidden.device).total_memory)
    return _CPU_CHUNK_LOGITS * hidden.element_size()


def _check_options(
    weight: Tensor,
    chunk_memory_bytes: int | None,
    z_loss: float,
    logit_softcap: float,
    main_grad: Tensor | None,
    grad_scale: float | None,
) -> None:
    if chunk_memory_bytes is not None and chunk_memory_bytes < 1:
        raise ValueError(f"chunk_memory_bytes must be positive, or None for the default, found {chunk_memory_bytes}")
    for name, value in (("z_loss", z_loss), ("logit_softcap", logit_softcap)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be 0 (none) or positive and finite, found {value}")
    if main_grad is None:
        return
    if grad_scale is None:
        raise ValueError("main_grad needs grad_scale, the gradient that backward will bring for loss_sum; found None")
    if main_grad.dtype != torch.float32:
        raise TypeError(f"main_grad must be torch.float32, found {main_grad.dtype}")
    if main_grad.shape != weight.shape or main_grad.device != weight.device:
        raise ValueError(
            f"main_grad must be {list(weight.shape)} on {weight.device} as weight, found {list(main_grad.shape)} on "
            f"{main_grad.device}"
        )


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> None:
    if not hidden.dtype.is_floating_point or hidden.dtype != weight.dtype:
        raise TypeError(f"hidden and weight must share a floating dtype, found {hidden.dtype} and {weight.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be torch.int64, found {labels.dtype}")
    if loss_weight.dtype != torch.float32:
        raise TypeError(f"loss_weight must be torch.float32, found {loss_weight.dtype}")
    devices = {"weight": weight.device, "labels": labels.device, "loss_weight": loss_weight.device}
    for name, device in devices.items():
        if device != hidden.device:
            raise ValueError(f"{name} is on {device}, hidden on {hidden.device}: move them to one device")


def _check_sizes(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor, vocab_size: int, slices: int, tp: int
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [n, h] and weight [v_padded/tp, h] with the same h, "
            f"found {list(hidden.shape)} and {list(weight.shape)}"
        )
    n = hidden.shape[0] * slices
    for name, tensor in (("labels", labels), ("loss_weight", loss_weight)):
        if tensor.shape != (n,):
            raise ValueError(
                f"{name} must be [{n}], one for each token of hidden {list(hidden.shape)} "
                f"in {slices} sequence-parallel slice(s), found {list(tensor.shape)}"
            )
    if vocab_size < 1 or weight.shape[0] * tp < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} must be at least 1 and fit the head, which has {weight.shape[0]} rows on each of "
            f"{tp} tensor-parallel rank(s), {weight.shape[0] * tp} in all"
        )


def _check_layout(masked: MaskedRows, group: dist.ProcessGroup | None, sequence_parallel: bool) -> None:
    wanted = (group, group is not None and sequence_parallel)
    if (found := (masked.group, masked.slots is not None)) != wanted:
        raise ValueError(
            f"masked rows were located for (group, sequence_parallel) {found}, this head's are {wanted}: give "
            "MaskedRows.locate the same ones"
        )


def _check_labels(row_labels: Tensor, rows: Tensor, vocab_size: int, excluded_id: int | None) -> None:
    outside = (row_labels < 0) | (row_labels >= vocab_size)
    if excluded_id is not None:
        outside |= row_labels == excluded_id
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"label {int(row_labels[first])} of token {int(rows[first])} is outside the vocabulary [0, {vocab_size})"
            f"{'' if excluded_id is None else f' without {excluded_id}'} "
            f"({int(outside.sum())} such labels among {rows.numel()} masked tokens)"
        )

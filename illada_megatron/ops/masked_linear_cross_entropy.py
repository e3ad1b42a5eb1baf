"""Cross-entropy of the masked tokens straight from hidden states: the logits of unmasked tokens never exist.

The objective of a masked-diffusion language model (arXiv 2502.09992, equation 3) is

    sum over masked i of  w_i * CE(hidden_i @ weight^T, label_i),        w_i = 1 / p

so the head is applied to masked rows only. With the head's rows cut over a tensor-parallel group each rank holds the
logits of its own vocabulary range, and three numbers a row (maximum, sum of exponentials, label's logit) are exchanged.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from illada_megatron.ops.masked_rows import MaskedRows

# Elements of the fp32 temporary: rows are turned to fp32 in pieces of at most this many (64 MiB)
_PIECE_ELEMENTS = 1 << 24


class MaskedLoss(NamedTuple):
    """What the training step and its metrics need of a batch. fp64 instead of fp32 where the inputs are fp64."""

    loss_sum: Tensor  # scalar fp32, sum_i w_i CE_i in nats, differentiable; the same on every rank of the group
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
) -> MaskedLoss:
    """Weighted cross-entropy of the rows whose `loss_weight` is not 0.

    Args:
        hidden: `[n, h]` final hidden states; with `sequence_parallel` this rank's slice of them, `[n/tp, h]`.
        weight: `[v_padded/tp, h]`, this rank's consecutive rows of the output (or tied) embedding; hidden's dtype.
        labels: `[n]` int64, ids in the whole vocabulary; read at masked rows only.
        loss_weight: `[n]` float32, 1/p at masked rows, 0 elsewhere; the same on every rank of the group.
        vocab_size: real size of the vocabulary. Rows of the head from there on are padding: they take no part in the
            softmax and get zero gradient, so the result does not depend on how much padding a layout needs.
        tp_group: the tensor-parallel group; None: the head is whole.
        sequence_parallel: hidden is cut along n over the group.

    Returns:
        `MaskedLoss`. Statistics are fp32 (fp64 for fp64 inputs). Gradients come back in the inputs' dtype: hidden's is
        summed over the group, weight's belongs to this rank's rows. With no masked row the loss is 0, the gradients
        are zero and the graph is still connected.

    Raises:
        TypeError: a dtype differs from the above.
        ValueError: shapes or devices disagree, the head has fewer rows than vocab_size, or a masked row's label is
            outside [0, vocab_size).
    """
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    tp, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    _check_tensors(hidden, weight, labels, loss_weight)
    _check_sizes(hidden, weight, labels, loss_weight, vocab_size, tp if sequence_parallel else 1, tp)

    masked = MaskedRows.locate(loss_weight, group, sequence_parallel)
    row_labels = labels[masked.rows]
    _check_labels(row_labels, masked.rows, vocab_size)

    first_id = rank * weight.shape[0]
    real_rows = min(max(vocab_size - first_id, 0), weight.shape[0])
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss_sum, cross_entropy = _MaskedLinearCrossEntropy.apply(
        hidden, weight, row_labels - first_id, loss_weight[masked.rows], masked, real_rows, with_gradient
    )
    return MaskedLoss(loss_sum, cross_entropy, masked.rows)


class _MaskedLinearCrossEntropy(torch.autograd.Function):
    """Forward turns the logits, in place, into the loss's gradient with respect to them, up to the scalar that backward
    brings: `[m, v/tp]` exists once, in the inputs' dtype, and backward may run more than once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,  # [m] int64, relative to this rank's first id: outside [0, real_rows) elsewhere
        row_weight: Tensor,  # [m] float32
        masked: MaskedRows,
        real_rows: int,
        with_gradient: bool,  # inside a Function gradients look enabled under no_grad too
    ) -> tuple[Tensor, Tensor]:
        gathered = masked.gather(hidden)  # [m, h]
        logits = gathered @ weight[:real_rows].T  # [m, v/tp] without padding
        log_normalizer, cross_entropy = _statistics(logits, targets, masked.group)
        row_weight = row_weight.to(cross_entropy.dtype)
        loss_sum = torch.dot(row_weight, cross_entropy)
        if with_gradient:
            _logits_to_gradient_(logits, targets, log_normalizer, row_weight)
            ctx.save_for_backward(gathered, weight, logits)
            ctx.masked, ctx.local_tokens = masked, hidden.shape[0]
        ctx.mark_non_differentiable(cross_entropy)
        return loss_sum, cross_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gathered, weight, grad_logits = ctx.saved_tensors
        masked: MaskedRows = ctx.masked
        real_rows = grad_logits.shape[1]
        grad_hidden = grad_weight = pending = None
        if ctx.needs_input_grad[0]:
            grad_rows = (grad_logits @ weight[:real_rows]).mul_(grad_loss)  # [m, h], this vocabulary range's part
            mine, pending = masked.start_reduce(grad_rows)
        if ctx.needs_input_grad[1]:  # computed while hidden's gradient travels
            grad_weight = torch.empty_like(weight)
            torch.mm(grad_logits.T, gathered, out=grad_weight[:real_rows])
            grad_weight[:real_rows] *= grad_loss
            grad_weight[real_rows:] = 0
        if ctx.needs_input_grad[0]:
            if pending is not None:
                pending.wait()
            grad_hidden = masked.scatter(mine, ctx.local_tokens)
        return grad_hidden, grad_weight, None, None, None, None, None


def _statistics(logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Log of the softmax's normalizer and cross-entropy, each `[m]` in the statistics' dtype."""
    m, width = logits.shape
    dtype = _statistics_dtype(logits.dtype)
    largest = torch.full((m,), -torch.inf, dtype=dtype, device=logits.device)
    exp_sum = torch.zeros_like(largest)  # of exp(logit - largest)
    label_logit = torch.full_like(largest, -torch.inf)  # stays so where another rank holds the label
    for piece in _pieces(m, width):
        values = logits[piece].to(dtype, copy=True)
        held, column = _held_columns(targets[piece], width)
        label_logit[piece] = torch.where(held, values.gather(1, column).squeeze(1), -torch.inf)
        largest[piece] = values.amax(1)
        exp_sum[piece] = values.sub_(largest[piece, None]).exp_().sum(1)
    if group is not None and m > 0:
        # One all-gather instead of three all-reduces; the sum's order, hence its rounding, is the same on every rank
        mine = torch.stack((largest, exp_sum, label_logit))  # [3, m]
        gathered = mine.new_empty(group.size() * 3, m)
        dist.all_gather_single(gathered, mine, group=group)
        parts = gathered.view(-1, 3, m)
        largest, label_logit = parts[:, 0].amax(0), parts[:, 2].amax(0)
        exp_sum = (parts[:, 1] * (parts[:, 0] - largest).exp()).sum(0)
    log_sum = exp_sum.log()
    # (largest - label) first: exact where the label is the most probable token, whatever the size of the logits
    return largest + log_sum, (largest - label_logit) + log_sum


def _logits_to_gradient_(logits: Tensor, targets: Tensor, log_normalizer: Tensor, row_weight: Tensor) -> None:
    """Overwrite logits `[m, v/tp]` with d loss_sum / d logits = w * (softmax - onehot(label))."""
    m, width = logits.shape
    for piece in _pieces(m, width):
        values = logits[piece].to(log_normalizer.dtype, copy=True).sub_(log_normalizer[piece, None]).exp_()
        held, column = _held_columns(targets[piece], width)
        values.scatter_add_(1, column, -held.to(values.dtype)[:, None])
        logits[piece] = values.mul_(row_weight[piece, None])


def _held_columns(targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Whether this rank holds each label, `[m]`, and the column it has, `[m, 1]` (column 0 where it does not)."""
    held = (targets >= 0) & (targets < width)
    return held, torch.where(held, targets, 0)[:, None]


def _pieces(m: int, width: int) -> list[slice]:
    """Row ranges whose fp32 copy is small; none where this rank's rows of the head are all padding."""
    if width == 0:
        return []
    step = max(1, _PIECE_ELEMENTS // width)
    return [slice(start, min(start + step, m)) for start in range(0, m, step)]


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def _check_labels(row_labels: Tensor, rows: Tensor, vocab_size: int) -> None:
    outside = (row_labels < 0) | (row_labels >= vocab_size)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"label {int(row_labels[first])} of token {int(rows[first])} is outside the vocabulary [0, {vocab_size}) "
            f"({int(outside.sum())} such labels among {rows.numel()} masked tokens)"
        )

"""Ways to compute sum_i w_i CE(hidden_i @ weight^T, label_i) over the rows whose w_i is not 0: the peers', and ours.

Each is made once, for a head, and then called as `loss(hidden, weight, labels, loss_weight)`: hidden [n, h], weight
[v, h], labels [n] int64, loss_weight [n] float32; it returns a scalar that `backward` is called on.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss.loss_cases import FUSED, GATHERED_HIDDEN, MAIN_GRAD, REFERENCE
from illada_megatron.ops import masked_linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_CHUNK_ROWS = 256


class MissingError(Exception):
    """A variant cannot be measured here; says why."""


def make_loss(variant: str, weight: Tensor) -> Loss:
    """The variant for a head of `weight`'s shape, dtype and device. Raises MissingError."""
    if variant in (REFERENCE, FUSED, MAIN_GRAD):
        return _ours(variant, weight)
    if variant in ("liger-kernel", "cut-cross-entropy"):
        return _gpu_package(variant, weight)
    return _PEERS[variant]


def _all_logits(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
    return torch.dot(loss_weight, F.cross_entropy(F.linear(hidden, weight), labels, reduction="none").float())


def _gathered_logits(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
    """As in LLaDA's guideline: the head on all rows, the loss on the masked ones."""
    rows = loss_weight > 0
    losses = F.cross_entropy(F.linear(hidden, weight)[rows], labels[rows], reduction="none")
    return torch.dot(loss_weight[rows], losses.float())


def _on_gathered_hidden(loss: Loss) -> Loss:
    """`loss`, of the masked rows alone."""

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
        rows = loss_weight.nonzero().flatten()
        return loss(hidden.index_select(0, rows), weight, labels[rows], loss_weight[rows])

    return call


def _megatron(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return torch.dot(loss_weight, vocab_parallel_cross_entropy(F.linear(hidden, weight), labels))


def _megatron_fused(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    return torch.dot(loss_weight, fused_vocab_parallel_cross_entropy(F.linear(hidden, weight), labels, group))


class _ChunkedLoss(torch.autograd.Function):
    """A few rows at a time; gradients are computed in the forward pass, as the logits are there. They are added up in
    the inputs' dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = loss_weight.new_zeros(())
        for start in range(0, len(hidden), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            loss, grad = _loss_and_gradient(hidden[chunk] @ weight.T, labels[chunk, None], loss_weight[chunk, None])
            total += loss
            torch.mm(grad, weight, out=grad_hidden[chunk])
            grad_weight.addmm_(grad.T, hidden[chunk])
            del grad  # before the next chunk's logits
        ctx.gradients = grad_hidden, grad_weight
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None  # given away: nobody has to copy them
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None


def _loss_and_gradient(logits: Tensor, column: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """logits [m, v], labels and weights [m, 1] -> the loss in fp32, and its gradient [m, v] in the logits' dtype."""
    log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    loss = -(row_weight * log_p.gather(1, column)).sum()
    grad = log_p.exp_().scatter_add_(1, column, -torch.ones_like(row_weight)).mul_(row_weight)
    return loss, grad.to(logits.dtype)


_PEERS: dict[str, Loss] = {
    "all logits": _all_logits,
    "gathered logits": _gathered_logits,
    GATHERED_HIDDEN: _on_gathered_hidden(_all_logits),
    "megatron-core, all rows": _megatron,
    "megatron-core, gathered hidden": _on_gathered_hidden(_megatron),
    "megatron-core fused, gathered hidden": _on_gathered_hidden(_megatron_fused),
    "chunked torch": _on_gathered_hidden(_ChunkedLoss.apply),
}


def _gpu_package(variant: str, weight: Tensor) -> Loss:
    """Triton kernels by others. liger-kernel weighs all rows alike, which the benchmark's rows are."""
    if not weight.is_cuda:
        raise MissingError(f"{variant} needs a GPU")
    try:
        if variant == "liger-kernel":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            summed = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            return _on_gathered_hidden(lambda x, w, labels, scale: scale[0] * summed(w, x, labels))
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise MissingError(f"{variant} is not installed ({error})") from error
    return _on_gathered_hidden(
        lambda x, w, labels, scale: torch.dot(scale, linear_cross_entropy(x, w, labels, reduction="none").float())
    )


def _ours(variant: str, weight: Tensor) -> Loss:
    keywords: dict[str, Any] = {"implementation": "reference" if variant == REFERENCE else "fused"}
    if variant == MAIN_GRAD:
        keywords |= {"main_grad": torch.zeros_like(weight, dtype=torch.float32), "grad_scale": 1.0}
    missing = keywords.keys() - inspect.signature(masked_linear_cross_entropy).parameters.keys()
    if missing and variant == REFERENCE:  # the only implementation there is
        keywords = {}
    elif missing:
        raise MissingError(f"masked_linear_cross_entropy takes no {', '.join(sorted(missing))} at this commit")

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
        vocab_size = weight.shape[0]
        return masked_linear_cross_entropy(
            hidden, weight, labels, loss_weight, vocab_size=vocab_size, **keywords
        ).loss_sum

    return call

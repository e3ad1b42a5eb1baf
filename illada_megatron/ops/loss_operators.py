"""The masked loss as operators of torch.library, with meta and autograd registrations: `torch.compile`, FakeTensor and
`opcheck` see one operator; the chunk loop is inside."""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.flop_counter import register_flop_formula

from illada_megatron.ops.chunked_loss import Gradients, Head, chunk_rows, losses_and_gradients
from illada_megatron.ops.logit_passes import statistics_dtype
from illada_megatron.ops.logit_sweeps import chosen_sweeps

if TYPE_CHECKING:  # torch 2.11 has no such type
    from torch.distributed.distributed_c10d import GroupName


class Rows(NamedTuple):
    """The masked rows."""

    hidden: Tensor  # [m, h]
    weight: Tensor  # [v_padded/tp, h]
    targets: Tensor  # [m] int64, relative to this rank's first id: outside [0, real_rows) elsewhere
    row_weight: Tensor  # [m] float32


class Settings(NamedTuple):
    """What is no tensor."""

    real_rows: int  # of weight; the others are padding
    z_loss: float
    softcap: float  # 0: none
    memory_bytes: int  # for the logits that exist at a time
    fused: bool
    group: str | None  # name of the process group that holds the other rows; None: there are none
    excluded_row: int | None  # of weight; takes no part. None: no such row here

    def head(self, hidden: Tensor, weight: Tensor) -> Head:
        """weight `[v_padded/tp, h]` without its padding, and what is made of the logits of hidden `[m, h]`."""
        return Head(
            weight[: self.real_rows],
            weight.shape[0],
            self.z_loss,
            self.softcap,
            chosen_sweeps(hidden, weight, self.fused, self.excluded_row),
            None if self.group is None else _resolve_process_group(cast("GroupName", self.group)),
        )


def apply(rows: Rows, settings: Settings, main_grad: Tensor | None, grad_scale: float | None) -> tuple[Tensor, Tensor]:
    """(loss_sum, cross_entropy `[m]`). main_grad: takes the weight's gradient of grad_scale * loss_sum at once."""
    with_gradient = torch.is_grad_enabled() and (rows.hidden.requires_grad or rows.weight.requires_grad)
    if main_grad is None or not with_gradient:
        loss_sum, cross_entropy, _, _ = _loss(*rows, *settings, with_gradient)
    else:
        loss_sum, cross_entropy = _IntoMainGrad.apply(rows, settings, main_grad, grad_scale, *rows)
    return loss_sum, cross_entropy


@torch.library.custom_op("illada::masked_linear_cross_entropy", mutates_args=())
def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    real_rows: int,
    z_loss: float,
    softcap: float,
    memory_bytes: int,
    fused: bool,
    group: str | None,
    excluded_row: int | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum, cross_entropy [m], gradients of hidden and weight; empty ones unless with_gradient)."""
    rows = Rows(hidden, weight, targets, row_weight)
    settings = Settings(real_rows, z_loss, softcap, memory_bytes, fused, group, excluded_row)
    if not with_gradient:
        return *_run(rows, settings, None), hidden.new_empty(0), weight.new_empty(0)
    # Several chunks add to the gradient of every row of the weight: in fp32
    several = chunk_rows(hidden, settings.head(hidden, weight), memory_bytes) < hidden.shape[0]
    grad_weight = torch.zeros_like(weight, dtype=statistics_dtype(weight.dtype) if several else None)
    into = Gradients(torch.empty_like(hidden), grad_weight[:real_rows], 1.0)
    loss_sum, cross_entropy = _run(rows, settings, into)
    return loss_sum, cross_entropy, into.rows, grad_weight.to(weight.dtype)


@_loss.register_fake
def _(hidden: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with_gradient = settings[-1]
    cross_entropy = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))
    gradients = (
        (torch.empty_like(hidden), torch.empty_like(weight))
        if with_gradient
        else (hidden.new_empty(0), weight.new_empty(0))
    )
    return cross_entropy.new_empty(()), cross_entropy, *gradients


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    _, cross_entropy, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(cross_entropy, grad_hidden, grad_weight)
    ctx.save_for_backward(grad_hidden, grad_weight)


def _scale_gradients(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = ctx.saved_tensors
    return _scaled(grad_hidden, grad_loss), _scaled(grad_weight, grad_loss), *(None,) * 10


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """A copy that can be spared where the loss is what backward was called on; asking a GPU would make it wait, and a
    traced scale has no value."""
    if type(scale) is Tensor and scale.device.type == "cpu" and scale.item() == 1:
        return gradient
    return gradient * scale.to(gradient.dtype)


_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("illada::masked_linear_cross_entropy_into", mutates_args={"main_grad"})
def _loss_into(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    real_rows: int,
    z_loss: float,
    softcap: float,
    memory_bytes: int,
    fused: bool,
    group: str | None,
    excluded_row: int | None,
    main_grad: Tensor,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum, cross_entropy [m], gradient of hidden); the weight's is added to main_grad. Both times grad_scale."""
    rows = Rows(hidden, weight, targets, row_weight)
    settings = Settings(real_rows, z_loss, softcap, memory_bytes, fused, group, excluded_row)
    into = Gradients(torch.empty_like(hidden), main_grad[:real_rows], grad_scale)
    return *_run(rows, settings, into), into.rows


@_loss_into.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    cross_entropy = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))
    return cross_entropy.new_empty(()), cross_entropy, torch.empty_like(hidden)


class _IntoMainGrad(torch.autograd.Function):
    """Autograd of `masked_linear_cross_entropy_into` (torch registers none for operators that write to an argument)."""

    @staticmethod
    def forward(
        ctx: Any, rows: Rows, settings: Settings, main_grad: Tensor, grad_scale: float, *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss_sum, cross_entropy, grad_hidden = _loss_into(*rows, *settings, main_grad, grad_scale)
        ctx.grad_scale = grad_scale
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(cross_entropy)
        return loss_sum, cross_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # the weight's gradient is in main_grad already: a wrong scale would stay there unseen
        torch._assert_async(
            (grad_loss - ctx.grad_scale).abs() <= 1e-5 * abs(ctx.grad_scale),
            f"the masked loss added the weight's gradient to main_grad for a loss scaled by {ctx.grad_scale}, but "
            "backward brings another scale: give the right grad_scale, or no main_grad",
        )
        (grad_hidden,) = ctx.saved_tensors
        return None, None, None, None, grad_hidden, None, None, None


def _run(rows: Rows, settings: Settings, into: Gradients | None) -> tuple[Tensor, Tensor]:
    row_weight = rows.row_weight.to(statistics_dtype(rows.hidden.dtype))
    losses = losses_and_gradients(
        rows.hidden, settings.head(rows.hidden, rows.weight), rows.targets, row_weight, settings.memory_bytes, into
    )
    penalty = losses.log_normalizer.square_().mul_(settings.z_loss).add_(losses.cross_entropy)
    return torch.dot(row_weight, penalty), losses.cross_entropy


@register_flop_formula(
    [torch.ops.illada.masked_linear_cross_entropy, torch.ops.illada.masked_linear_cross_entropy_into]
)
def _count_flops(hidden_shape: list[int], *others: Any, **_: Any) -> int:
    """For torch's FlopCounterMode, which does not look into operators: the product of the logits, and the two of the
    gradients."""
    (m, h), real_rows = hidden_shape, others[3]
    with_gradient = others[-1] if len(others) == 11 else True
    return (6 if with_gradient else 2) * m * h * real_rows

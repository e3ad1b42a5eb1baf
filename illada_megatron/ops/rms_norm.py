"""RMSNorm, y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, eq. 4).

On a CPU the compiled operator `illada::rms_norm` (csrc/layer_kernels) reads x once and keeps a number a row; elsewhere
it is torch's.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.ops import kernels

_OPERATOR = "rms_norm"
missing = partial(kernels.missing_in_layers, _OPERATOR)
"""Why the compiled operator cannot be used on a device with a dtype; None: it can, and is."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., h], weight [h] of the same dtype -> [..., h]. Statistics and the sums of weight's gradient are float32.

    Raises TypeError or RuntimeError where dtypes or shapes are not as above.
    """
    if missing(x.device, x.dtype) is not None:
        return rms_norm_reference(x, weight, eps)
    y, _ = torch.ops.illada.rms_norm(x, weight, eps)
    return y


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same of torch's operators: any device and dtype."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    grad_x, grad_weight = torch.ops.illada.rms_norm_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, None


if kernels.load_error() is None:
    torch.library.register_autograd(f"illada::{_OPERATOR}", _backward, setup_context=_setup_context)

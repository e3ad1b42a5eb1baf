"""SwiGLU, silu(gate) * up, of a tensor that holds gate and up beside each other (arXiv 2002.05202, eq. 6).

On a CPU the compiled operator `illada::swiglu` (csrc/layer_kernels) reads it once, without copies of the halves;
elsewhere torch's own operators do the same.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.ops import kernels

_OPERATOR = "swiglu"
missing = partial(kernels.missing_in_layers, _OPERATOR)
"""Why the compiled operator cannot be used on a device with a dtype; None: it can, and is."""


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2 f], gate then up -> [..., f]. Computed in float32, rounded once.

    Raises TypeError or RuntimeError where dtype or shape are not as above.
    """
    if missing(x.device, x.dtype) is not None:
        return swiglu_reference(x)
    return torch.ops.illada.swiglu(x)


def swiglu_reference(x: Tensor) -> Tensor:
    """The same of torch's operators: any device, dtype and order of derivative."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG001 - called by name
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.illada.swiglu_backward(grad, *ctx.saved_tensors)


if kernels.load_error() is None:
    torch.library.register_autograd(f"illada::{_OPERATOR}", _backward, setup_context=_setup_context)

"""Linear layers that multiply for generation on a CPU: a row does not depend on the others (ops/row_product.py)."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from illada_megatron.ops.row_product import missing, row_product


def take_row_products(model: torch.nn.Module, device: torch.device) -> str | None:
    """All linear layers of `model` on `device`, the head among them, for good: they have no gradient then. Returns why
    they do not; None: they do."""
    reason = missing(device, next(model.parameters()).dtype)
    layers = [module for module in model.modules() if isinstance(module, ColumnParallelLinear | RowParallelLinear)]
    if reason is None and any(layer.sequence_parallel for layer in layers):
        reason = "its layers are sequence parallel: of their input a rank has some rows"
    if reason is None:
        for layer in layers:
            layer._forward_impl = _multiplied  # megatron-core's name for what multiplies
    return reason


def _multiplied(input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
    """Of megatron-core's other arguments none is for a rank's own product without a gradient."""
    product = row_product(input, weight)
    return product if bias is None else product + bias

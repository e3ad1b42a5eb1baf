"""A linear layer's product for generation on a CPU: a row has the same bits whatever other rows there are, and few rows
take little more than the reading of the weight (csrc/cpu/row_product.h)."""

import torch
from torch import Tensor

from illada_megatron.ops import kernels


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it is not used on a device with a dtype; None: it is."""
    if device.type != "cpu":
        return "it is a CPU's"
    if dtype == torch.bfloat16 and kernels.has_cpu_products(dtype):
        return "this processor multiplies bfloat16 itself, which the libraries use and it does not"
    return kernels.missing_in_layers("row_product", device, dtype)


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k], weight [n, k] of one dtype, float32 or bfloat16 -> x weight^T [..., n], summed in float32. It has no
    gradient.

    Raises TypeError or RuntimeError where dtypes or shapes are not as above.
    """
    result: Tensor = torch.ops.illada.row_product(x, weight)
    return result

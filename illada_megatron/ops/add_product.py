"""A product added to a sum that has more bits than its factors, as gradients summed in float32 need it."""

import torch
from torch import Tensor

from illada_megatron.ops import kernels

# Rows of a factor that exist in the sum's dtype at a time
_PIECE_ROWS = 8192


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total `[m, n]` += a `[m, k]` b `[k, n]`, rounded to total's dtype alone; a and b of one dtype, the columns of
    total and b contiguous.

    On a GPU it is cuBLAS's product of bf16 factors into float32, on a CPU that multiplies bf16 itself oneDNN's
    (csrc/cpu/add_product.h). Other CPUs turn bf16 into float32 in any case, and get it as float32.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    elif total.dtype == torch.float32 and a.dtype == torch.bfloat16 and kernels.has_cpu_products(a.dtype):
        torch.ops.illada.add_product_(total, a, b)
    else:
        wide = b.to(total.dtype)
        for part, factor in zip(total.split(_PIECE_ROWS), a.split(_PIECE_ROWS), strict=True):
            part.addmm_(factor.to(total.dtype), wide)

"""Megatron's protocol for gradients that are added to a parameter's fp32 `main_grad` before autograd knows of them."""

from typing import Any

import torch
from torch import Tensor


class InMainGrad(torch.autograd.Function):
    """Identity on a parameter whose user adds the gradient to `main_grad` itself and returns none.

    megatron-core's DDP counts a parameter as ready when autograd hands it a gradient, and reads that gradient unless
    `grad_added_to_main_grad` is set (distributed_data_parallel.py): so it gets one that nobody reads. Where the tied
    embedding is on the same stage (`zero_out_wgrad`), the embedding's own gradient arrives and is to be added.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parameter = parameter
        return parameter.view_as(parameter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        if gradient is not None:
            raise RuntimeError("the gradient of a weight whose gradient is in main_grad already came from autograd too")
        if getattr(ctx.parameter, "zero_out_wgrad", False):
            return None
        ctx.parameter.grad_added_to_main_grad = True
        return torch.empty_like(ctx.parameter)

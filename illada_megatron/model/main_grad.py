"""Megatron's protocol for gradients that are added to a parameter's fp32 `main_grad` before autograd knows of them."""

from typing import Any

import torch
from torch import Tensor


def hand_over(parameter: Tensor) -> Tensor:
    """What autograd is given for a parameter whose gradient is in main_grad already.

    megatron-core's DDP counts a parameter as ready when autograd hands it a gradient, and reads that gradient unless
    `grad_added_to_main_grad` is set (distributed_data_parallel.py): so it gets one that nobody reads. The memory is not
    touched.
    """
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # set by megatron-core where the embedding is tied on one stage, for a gradient of the embedding's from autograd
    parameter.zero_out_wgrad = False  # type: ignore[attr-defined]
    return torch.empty_like(parameter)


class InMainGrad(torch.autograd.Function):
    """Identity on a parameter whose user adds the gradient to `main_grad` itself and returns none.

    hands_over: this is the parameter's last user in the backward pass, and says that its gradient is there.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, hands_over: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parameter, ctx.hands_over = parameter, hands_over
        return parameter.view_as(parameter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        if gradient is not None:
            raise RuntimeError("the gradient of a weight whose gradient is in main_grad already came from autograd too")
        return hand_over(ctx.parameter) if ctx.hands_over else None, None

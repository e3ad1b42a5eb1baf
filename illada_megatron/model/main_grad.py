"""Megatron's protocol for gradients that are added to a parameter's fp32 `main_grad` before autograd knows of them."""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from illada_megatron.ops.add_product import add_product_


class SumsInMainGrad:
    """Of a megatron-core linear layer: where DDP keeps a main_grad, the weight's gradient of each micro-batch is added
    to it as an fp32 product (megatron-core's `gradient_accumulation_fusion`, which its own layers have only with Apex).
    Rounded to bf16 for each micro-batch first, small gradients would be lost."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None or not torch.is_grad_enabled():
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        # Handed over here: in the backward pass of remade_input.py the layer has the weight without its attributes
        weight = InMainGrad.apply(weight, True)
        weight.main_grad = main_grad  # type: ignore[attr-defined]
        kwargs["gradient_accumulation_fusion"] = True
        return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]


_APEX = getattr(layers, "fused_weight_gradient_mlp_cuda", None)
"""Its compiled GEMM, where it is installed."""


def _wgrad_gemm_accum_fp32(inputs: Tensor, grad_outputs: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] fp32 += grad_outputs [t, out]^T inputs [t, in]: Apex's on a GPU where there is one."""
    if _APEX is not None and main_grad.is_cuda:
        _APEX.wgrad_gemm_accum_fp32(inputs, grad_outputs, main_grad)
    else:
        add_product_(main_grad, grad_outputs.t(), inputs)


def bind_weight_gradient() -> None:
    """Give the backward pass of megatron-core's linears this GEMM: it looks up Apex's name in its own module, and has
    no argument for it. Calling it again does nothing."""
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_wgrad_gemm_accum_fp32)


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

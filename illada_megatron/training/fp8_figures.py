"""How the layers' tensors fill FP8's range: the largest value of each that is quantised, and its factor, for curves."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from illada_megatron.checkpoint.fp8_state import linear_layers
from illada_megatron.config import RunConfig
from illada_megatron.config.parameters import layer_of

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
# of a linear layer, Transformer Engine's quantisers by direction and place
TENSORS = (("input", "scaling_fwd", 0), ("weight", "scaling_fwd", 1), ("grad_output", "scaling_bwd", 0))


def fp8_figures(chunks: Sequence[nn.Module], config: RunConfig, device: torch.device) -> dict[str, float]:
    """`fp8_amax/` and `fp8_scale/` of layer, linear and tensor -> the largest value over all ranks, and their smallest
    factor. tensorwise: of the last micro-batch, where Transformer Engine keeps it (2.11, not 2.20); delayed: of the
    remembered passes. Nothing for recipes whose factors are of blocks, and without FP8. Every rank calls it: one
    collective."""
    if config.training.precision != "fp8" or config.fp8.recipe not in ("tensorwise", "delayed"):
        return {}
    # of a tensor the largest value and the inverse of its factor: the largest over ranks is wanted of both
    found = torch.zeros(config.model.num_layers, len(LINEARS), len(TENSORS), 2, device=device)
    for name, module in linear_layers(chunks, config.model.tie_word_embeddings):
        if name.endswith(LINEARS) and module.fp8_initialized:
            layer, linear = layer_of(name) or 0, next(i for i, one in enumerate(LINEARS) if name.endswith(one))
            for index, (_, direction, number) in enumerate(TENSORS):
                _fill(found[layer, linear, index], module, direction, number)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return _named(found.cpu())


def _fill(found: torch.Tensor, module: Any, direction: str, number: int) -> None:
    state, quantizer = module.fp8_meta[direction], module.quantizers[direction][number]
    if hasattr(state, "amax_history"):
        found[0], found[1] = state.amax_history[:, number].max(), 1.0 / state.scale[number]
    elif hasattr(quantizer, "amax"):  # Transformer Engine 2.20 keeps neither of current scaling
        found[0], found[1] = quantizer.amax[0], 1.0 / quantizer.scale[0]


def _named(found: torch.Tensor) -> dict[str, float]:
    """Without layers that stay bf16, and what has not been seen yet."""
    figures: dict[str, float] = {}
    for layer, linears in enumerate(found.tolist()):
        for linear, tensors in zip(LINEARS, linears, strict=True):
            for (tensor, _, _), (amax, inverse) in zip(TENSORS, tensors, strict=True):
                if amax > 0 and inverse > 0:
                    where = f"layer_{layer:03d}.{linear.rpartition('.')[2]}/{tensor}"
                    figures |= {f"fp8_amax/{where}": amax, f"fp8_scale/{where}": 1.0 / inverse}
    return figures

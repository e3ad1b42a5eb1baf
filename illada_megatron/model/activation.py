"""The MLP's activation in the local layer spec, as megatron-core builds it from a spec."""

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from illada_megatron.model.remade_input import remakeable
from illada_megatron.ops.swiglu import swiglu


class SwiGLU(MegatronModule):
    """silu(gate) * up of linear_fc1's output: x [t, 1, 2 f], this rank's gate and up -> [t, 1, f]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if not config.gated_linear_unit or config.activation_func is not F.silu:
            raise ValueError(
                f"SwiGLU needs gated_linear_unit and activation_func silu, found {config.gated_linear_unit} and "
                f"{config.activation_func}"
            )

    def forward(self, x: Tensor) -> Tensor:
        kept = x.detach()
        return remakeable(swiglu(x), lambda: swiglu(kept))

"""RMSNorm of the local layer spec. megatron-core's torch fallback refuses sequence parallelism; this one allows it."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from illada_megatron.model.remade_input import remakeable
from illada_megatron.ops.rms_norm import rms_norm


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, eq. 4).

    x: [..., h] -> [..., h]. With sequence parallelism every tensor-parallel rank normalises its own tokens with the
    whole weight; the mark on the weight makes megatron-core sum its gradient over those ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        kept = x.detach()
        return remakeable(rms_norm(x, self.weight, self.eps), lambda: rms_norm(kept, self.weight, self.eps))

"""Operations that the model's head needs and torch does not have. Nothing here knows Megatron: groups are passed in."""

from illada_megatron.ops.masked_linear_cross_entropy import (
    MaskedLoss,
    chosen_implementation,
    masked_linear_cross_entropy,
)

__all__ = ["MaskedLoss", "chosen_implementation", "masked_linear_cross_entropy"]

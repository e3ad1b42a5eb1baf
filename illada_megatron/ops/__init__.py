"""Operators that layers and head need and torch does not have. Nothing here knows Megatron: groups are passed in.

In: tensors, process groups.
Out: tensors with gradients; why an implementation cannot run.
Never imported here: megatron-core, the configuration, anything else of the package.
"""

from illada_megatron.ops.masked_linear_cross_entropy import (
    MaskedLoss,
    chosen_implementation,
    masked_linear_cross_entropy,
)

__all__ = ["MaskedLoss", "chosen_implementation", "masked_linear_cross_entropy"]

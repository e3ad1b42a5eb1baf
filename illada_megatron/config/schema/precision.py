"""In which number format the layers' matrix products are done."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from illada_megatron.config.schema.base import Section

Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
RECIPE_MULTIPLES: dict[Recipe, int] = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
"""Tokens and features of a rank are multiples of this: the kernels' tiles, mxfp8's blocks."""
BLOCKWISE_GATHER_MULTIPLE = 128
"""Of what sequence parallelism gathers with blockwise: its blocks of 1 x 128 and 128 x 128 are not cut."""


class Fp8Config(Section):
    """training.precision fp8: the layers' linear products in FP8 by Transformer Engine; attention, norms, embedding and
    head stay bf16, the loss fp32 (docs/fp8.md). Inputs and weights are e4m3, gradients e5m2; blockwise and mxfp8 take
    e4m3 for all."""

    recipe: Recipe = "tensorwise"
    """How the factors are found that bring values into FP8's range. tensorwise: one a tensor, of its own largest value;
    delayed: one a tensor, of its largest values before; blockwise (Hopper): one for 1 x 128 values of inputs and
    gradients and for 128 x 128 of weights; mxfp8 (Blackwell): one for 32 values."""
    num_layers_at_start_in_bf16: NonNegativeInt | None = None
    """So many first layers stay bf16. None: 1 with tensorwise, 0 with the others."""
    num_layers_at_end_in_bf16: NonNegativeInt | None = None
    """So many last layers, likewise."""
    param_gather: bool = False
    """Ranks keep the layers' weights in FP8 alone, and gather them so after a step; fp32 main weights stay where they
    are, one part a data-parallel rank. Half the traffic of bf16 weights, and no bf16 copy beside the FP8 ones."""
    amax_history_len: PositiveInt = 1024
    """delayed: forward passes (micro-batches by model chunks of a stage) whose largest values are remembered..."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """...of which the factor is made: the largest, or the last."""

    @property
    def bf16_layers(self) -> tuple[int, int]:
        """How many first and last layers stay bf16."""
        usual = 1 if self.recipe == "tensorwise" else 0
        first, last = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        return (usual if first is None else first, usual if last is None else last)

"""What delayed scaling has to forget: passes that no step has learned from.

Each pass leaves its tensors' largest values in the layers, and the factors follow the largest of the remembered ones.
A step that is skipped would leave what was wrong with it: an infinite value keeps a factor as it is while the value is
remembered, and one that is only much too large makes it so small that what comes then is rounded to zero. Validation
counts no pass, but raises the values of the next one: losses would depend on when a run is validated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from illada_megatron.checkpoint.fp8_state import scalings
from illada_megatron.config import RunConfig


class ScalingBefore:
    """Factors and largest values of this rank's layers as they are when it is made; no work without delayed scaling."""

    def __init__(self, chunks: Sequence[nn.Module], config: RunConfig) -> None:
        delayed = config.training.precision == "fp8" and config.fp8.recipe == "delayed"
        self._chunks, self._tied = list(chunks) if delayed else [], config.model.tie_word_embeddings
        found = list(scalings(self._chunks, self._tied))
        self._before: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        if found:  # hundreds of tensors, copied by a few kernels: times 1, for there is none that only copies
            factors, histories = (
                torch._foreach_mul(tensors, 1.0)
                for tensors in ([one.scale for one in found], [one.amax_history for one in found])
            )
            pairs = zip(factors, histories, strict=True)
            self._before = {one.names(): pair for one, pair in zip(found, pairs, strict=True)}

    @torch.no_grad()
    def restore(self) -> None:
        """As if there had been no pass since; layers whose first one it was have seen nothing."""
        for one in scalings(self._chunks, self._tied):
            known = self._before.get(one.names())
            if known is None:
                one.begin_anew()
            else:
                one.scale.copy_(known[0])
                one.amax_history.copy_(known[1])

"""The moving average of the weights, which is evaluated and exported in their place.

    after each step that was taken:   ema = d ema + (1 - d) w,   d = min(ema_decay, (1 + n) / (10 + n))

n: steps that are in it already. The average begins at the weights; d grows from 0.1 on, so that the first ones, which
are noise, are soon forgotten (as TensorFlow's `ExponentialMovingAverage` with num_updates). In fp32, of what this
rank's optimizer updates, among the optimizer's state: a checkpoint has it, and any layout goes on from it, as from
Adam's moments.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from illada_megatron.checkpoint.sharded import end_gathers, spread_main_weights
from illada_megatron.checkpoint.state import held_parameters, optimizer_shards, start_ema
from illada_megatron.config import ModelConfig


class WeightEma:
    """The moving average of the weights that this rank's optimizer updates."""

    def __init__(
        self, decay: float, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, model: ModelConfig
    ) -> None:
        """Begins at the weights as they are."""
        self.decay = decay
        self.updates = 0
        """n."""
        self._chunks, self._optimizer = list(chunks), optimizer
        shards = optimizer_shards(optimizer, held_parameters([chunk.module for chunk in chunks], model)).values()
        self._averages: list[Tensor] = [start_ema(shard) for shard in shards]
        self._weights: list[Tensor] = [shard.main.detach() for shard in shards]

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self._averages:  # a rank may hold no part of any weight
            torch._foreach_lerp_(self._averages, self._weights, 1.0 - decay)

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """The model computes with the average meanwhile; afterwards all is as before, to the last bit. Every rank calls
        it; a save that is being written is secured before (`Saver.secure`)."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        end_gathers(self._chunks)
        for weight, average in zip(self._weights, self._averages, strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)
        spread_main_weights(self._chunks, self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, beside the tensors."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was; an empty one is that of a run that kept no average."""
        self.updates = state.get("updates", 0)

"""The peer whose layers are ours: megatron-core's GPTModel around them, with its own head and loss over all rows."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from benchmarks.step.megatron_step import MegatronStep, gpt_model, weighted_loss
from illada_megatron.config import RunConfig
from illada_megatron.diffusion import MaskedBatch
from illada_megatron.model import pack, transformer_config
from illada_megatron.model.layer_specs import block_spec, choose_implementation
from illada_megatron.runtime import Runtime
from illada_megatron.runtime.device import has_apex


class SameLayersStep(MegatronStep):
    """Transformer Engine's layers where it is, the local ones elsewhere; segments packed in one row, as ours are."""

    def __init__(self, config: RunConfig, run: Runtime) -> None:
        super().__init__(config, run, {})
        self._segments = {
            id(batch): pack(batch.cu_seqlens, batch.max_seqlen, batch.cu_seqlens.diff().tolist())
            for batch in self._batches
        }

    def _model(self, config: RunConfig, run: Runtime, _: dict[str, Any]) -> GPTModel:
        implementation = choose_implementation(config.runtime, run.device)
        core = transformer_config(config, run.device, implementation)
        # megatron-core refuses the fusion for its head, and so for all layers, where Apex's GEMM is missing
        core.gradient_accumulation_fusion &= has_apex()
        return gpt_model(config, run, core, block_spec(core, implementation, None))

    def _forward_step(self, batches: Iterator[MaskedBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        losses = model(
            batch.tokens.view(1, -1),
            self._positions,
            None,
            labels=batch.labels.view(1, -1),
            packed_seq_params=self._segments[id(batch)],
        )
        return losses, partial(weighted_loss, batch.loss_weight.view(1, -1))

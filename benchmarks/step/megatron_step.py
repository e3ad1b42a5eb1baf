"""The peer: a training step made of megatron-core's own model and loss, on the same batch."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from benchmarks.step.step_batches import count_work, global_batch
from illada_megatron.config import RunConfig
from illada_megatron.diffusion import MaskedBatch
from illada_megatron.model import fill_initial_weights, transformer_config
from illada_megatron.ops.tensor_fields import moved_to
from illada_megatron.runtime import Runtime
from illada_megatron.training.optimizer import build_optimizer, set_learning_rate
from illada_megatron.training.schedule import LearningRate


class MegatronStep:
    """GPTModel of local layers, made bidirectional, with its own loss over all rows; megatron-core's DDP, schedule and
    optimizer. Its initial weights are the package's, so that its losses are."""

    def __init__(self, config: RunConfig, run: Runtime, setting: dict[str, Any]) -> None:
        """setting: fields of megatron-core's TransformerConfig, see step_variants.PEER_SETTINGS."""
        self.config = config
        self._batches = [moved_to(batch, run.device.torch_device) for batch in global_batch(config, run)]
        self.work = count_work(config, self._batches)
        model = self._model(config, run, setting)
        self._chunk = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
        )
        model.config.finalize_model_grads_func = finalize_model_grads
        plain = config.parallel.model_copy(update={"use_distributed_optimizer": False})
        self._optimizer = build_optimizer(config.model_copy(update={"parallel": plain}), [self._chunk])
        self._schedule = LearningRate(config)
        self._schedule.begin(0, 0)
        self._steps = 0
        self._positions = torch.arange(config.data.sequence_length, device=run.device.torch_device).unsqueeze(0)

    def step(self) -> float:
        """One optimizer step; returns its loss in nats/token when the device is done."""
        first_sample = self._steps * self.config.training.global_batch_size
        lr = self._schedule.at(self._steps, first_sample)
        set_learning_rate(self._optimizer, lr, self.config.optimizer.weight_decay)
        self._chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(self._batches),
            model=self._chunk,
            num_microbatches=len(self._batches),
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=False,
        )
        self._optimizer.step()
        self._steps += 1
        return sum(float(loss["loss"]) for loss in losses) / len(losses)

    def _model(self, config: RunConfig, run: Runtime, setting: dict[str, Any]) -> GPTModel:
        # use_te_activation_func: our own layer spec brings its activation, megatron-core's does not
        fused = {"use_te_activation_func": False, "bias_activation_fusion": run.device.is_cuda}
        core = replace(transformer_config(config, run.device, "local"), **(fused | setting))
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
        return gpt_model(config, run, core, layer)

    def _forward_step(self, batches: Iterator[MaskedBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        return model(batch.tokens, self._positions, None, labels=batch.labels), partial(
            weighted_loss, batch.loss_weight
        )


def weighted_loss(loss_weight: Tensor, cross_entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """loss_weight and cross_entropy [b, s] -> nats/token."""
    loss = (loss_weight * cross_entropy).sum() / loss_weight.numel()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides it in place


def gpt_model(
    config: RunConfig, run: Runtime, core: TransformerConfig, layers: ModuleSpec | TransformerBlockSubmodules
) -> GPTModel:
    """megatron-core's model with our initial weights, on the device."""
    shape = config.model
    model = GPTModel(
        core,
        layers,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.max_sequence_length,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(shape.rotary_base),
    )
    model.layer_offset = 0  # asked for by fill_initial_weights: the first layer is this stage's
    fill_initial_weights([model], shape, config.training.seeds.init)
    return model.to(device=run.device.torch_device, dtype=core.params_dtype)  # its norms are born in fp32

"""The package's own training step, as the benchmark sees it: setup, `train_step`, and where its time goes."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.step.part_clock import Key, PartClock
from benchmarks.step.step_batches import batch_slices, count_work, global_batch
from illada_megatron.config import RunConfig
from illada_megatron.data.corpus.prefetch import Prefetcher
from illada_megatron.model import MaskPredictor
from illada_megatron.runtime import Runtime
from illada_megatron.training.setup import TrainingState, setup
from illada_megatron.training.trainer import train_step

_LAYER_REST = Key("other", "norms and residuals")
_STEP_REST = Key("other", "rest of the step")


class IlladaStep:
    """`illada_megatron.training.trainer.train_step`, over the same global batch every time.

    The same samples have the same masks, so that every step multiplies as many rows with the vocabulary, in every
    precision; the weights go on changing.
    """

    def __init__(self, config: RunConfig, run: Runtime) -> None:
        self.config = config
        self.run = run
        self.state: TrainingState = setup(config, run)
        self.state.loader.close()
        self.state.loader = self.state.source.prefetch(itertools.cycle(batch_slices(config)))
        self.work = count_work(config, global_batch(config, run))

    def step(self) -> float:
        """One optimizer step; returns its loss in nats/token when the device is done."""
        self.state.consumed_samples = 0
        record, _ = train_step(self.state)  # its metrics are read on the CPU, which waits for a GPU
        return record.loss

    @contextmanager
    def followed(self) -> Iterator[PartClock]:
        """Within the context, a step's time is charged part by part to the clock."""
        on_cuda = self.run.device.is_cuda
        with PartClock(_STEP_REST, torch.cuda.synchronize if on_cuda else None) as clock:
            self._follow_step(clock)
            for chunk in self.state.chunks:
                self._follow_model(clock, chunk.module)
            clock.restart()
            yield clock
            clock.switch(_STEP_REST)

    def _follow_step(self, clock: PartClock) -> None:
        """What surrounds the model: data, gradient buffers, optimizer."""
        import illada_megatron.training.validation as schedule

        clock.follow_call(Prefetcher, "__next__", Key("other", "waiting for masked batches"))
        # entered from the end of a backward pass, which stops in the embedding
        clock.follow_call(schedule, "forward_step", _STEP_REST)
        core = self.state.chunks[0].module.config
        clock.follow_call(core, "finalize_model_grads_func", Key("other", "gradient reduction (one rank)"))
        for chunk in self.state.chunks:
            clock.follow_call(chunk, "zero_grad_buffer", Key("other", "zeroing gradients"))
        optimizer = self.state.optimizer
        clock.follow_call(optimizer, "step", Key("optimizer", "norm, clipping, copies"))
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            clock.follow_call(part.optimizer, "step", Key("optimizer", "AdamW"))

    def _follow_model(self, clock: PartClock, model: MaskPredictor) -> None:
        from illada_megatron.model import head

        attention, mlp = Key("attention", "rotary, layout"), Key("MLP", "activation")
        embedding = Key("embedding", "rows and their gradient")
        clock.follow_module(model.embedding, embedding, after=embedding)
        clock.follow_module(model.decoder, _LAYER_REST, after=_LAYER_REST)
        for layer in model.decoder.layers:
            clock.follow_module(layer.self_attention, attention, after=_LAYER_REST)
            clock.follow_module(layer.self_attention.core_attention, Key("attention", "core"), after=attention)
            for linear in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj):
                clock.follow_module(linear, Key("attention", "projections"), after=attention)
            clock.follow_module(layer.mlp, mlp, after=_LAYER_REST)
            for linear in (layer.mlp.linear_fc1, layer.mlp.linear_fc2):
                clock.follow_module(linear, Key("MLP", "products"), after=mlp)
        clock.follow_loss(head, "masked_linear_cross_entropy", Key("head and loss", "all"), after=_LAYER_REST)
        owners = {"self_attention": "attention", "mlp": "MLP", "word_embeddings": "embedding", "output_layer": "head"}
        for name, parameter in model.named_parameters():
            owner = next((part for word, part in owners.items() if word in name), "other")
            part = "head and loss" if owner == "head" else owner
            clock.follow_accumulation(parameter, Key(part, "gradient accumulation"))

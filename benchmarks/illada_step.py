"""The package's own training step, as the benchmark sees it: setup, `train_step`, and where its time goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from part_clock import Key, PartClock
from step_figures import Work
from workloads import Workload, write_corpus

from illada_megatron.config import ModelConfig, RunConfig, load_config
from illada_megatron.data.prefetch import Prefetcher
from illada_megatron.model import MaskPredictor
from illada_megatron.runtime import Runtime, runtime
from illada_megatron.training.flops import training_flops
from illada_megatron.training.forward_step import BatchSlice
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
        self.work = self._count_work()

    def step(self) -> None:
        """One optimizer step; returns when the device is done."""
        self.state.consumed_samples = 0
        train_step(self.state)  # its metrics are read on the CPU, which waits for a GPU

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
        import illada_megatron.model.mask_predictor as head

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

    def _count_work(self) -> Work:
        """Matrix products of a step, by part: what the whole would lose without the part."""
        training, model = self.config.training, self.config.model
        size = training.global_batch_size
        slices = [BatchSlice(0, size, microbatch) for microbatch in range(size // training.micro_batch_size)]
        with self.state.source.prefetch(slices) as microbatches:
            batches = [one.batch for one in microbatches]
        masked = sum(int((batch.loss_weight > 0).sum()) for batch in batches if batch)
        pairs = sum(int(batch.cu_seqlens.diff().long().square().sum()) for batch in batches if batch)
        tokens = size * self.config.data.sequence_length

        def flops(shape: ModelConfig = model, masked: int = masked) -> float:
            return training_flops(shape, tokens, pairs, masked)

        total, head = flops(), flops() - flops(masked=0)
        mlp = total - flops(model.model_copy(update={"ffn_hidden_size": 0}))
        parts = {"attention": total - head - mlp, "MLP": mlp, "head and loss": head}
        return Work(tokens, masked, pairs, model.num_parameters, total, parts)


@contextmanager
def open_illada_step(workload: Workload, precision: str, threads: int | None, folder: Path) -> Iterator[IlladaStep]:
    """Set up a run of one process; `folder` takes its corpus."""
    prefix = write_corpus(folder / "train", workload)
    settings = [*workload.overrides(), f"data.train_paths=[{prefix}]", f"training.precision={precision}"]
    if threads is not None:
        settings.append(f"runtime.num_threads={threads}")
    config = load_config("tiny", settings)
    with runtime(config) as run:
        yield IlladaStep(config, run)

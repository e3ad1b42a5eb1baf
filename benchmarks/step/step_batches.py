"""The global batch that every variant trains on, and the work in it."""

import torch

from benchmarks.step.step_figures import Work
from illada_megatron.config import ModelConfig, RunConfig
from illada_megatron.data.corpus.configured import corpus_of_run
from illada_megatron.diffusion import MaskedBatch
from illada_megatron.runtime import Runtime
from illada_megatron.training.flops import training_flops
from illada_megatron.training.forward_step import BatchSlice, BatchSource, TrainingSamples


def global_batch(config: RunConfig, run: Runtime) -> list[MaskedBatch]:
    """The micro-batches of samples 0 to global_batch_size, in host memory, through the package's own data path."""
    training = config.training
    corpus = corpus_of_run(config, None)
    source = BatchSource(TrainingSamples(corpus, config, training.seeds.noise), config, run)
    with source.prefetch(batch_slices(config)) as microbatches:
        return [one.batch for one in microbatches if one.batch is not None]


def batch_slices(config: RunConfig) -> list[BatchSlice]:
    """The parts of that global batch."""
    size = config.training.global_batch_size
    return [BatchSlice(0, size, microbatch) for microbatch in range(size // config.training.micro_batch_size)]


def masked_rows(batch: MaskedBatch) -> int:
    """Rows that have to meet the vocabulary."""
    return int(torch.count_nonzero(batch.loss_weight))


def count_work(config: RunConfig, batches: list[MaskedBatch]) -> Work:
    """Matrix products of a step, by part: what the whole would lose without the part."""
    model = config.model
    masked = sum(map(masked_rows, batches))
    pairs = sum(int(batch.cu_seqlens.diff().long().square().sum()) for batch in batches)
    tokens = sum(batch.tokens.numel() for batch in batches)

    def flops(shape: ModelConfig = model, masked: int = masked) -> float:
        return training_flops(shape, tokens, pairs, masked)

    total, head = flops(), flops() - flops(masked=0)
    mlp = total - flops(model.model_copy(update={"ffn_hidden_size": 0}))
    parts = {"attention": total - head - mlp, "MLP": mlp, "head and loss": head}
    return Work(tokens, masked, pairs, model.num_parameters, total, parts)

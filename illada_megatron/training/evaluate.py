"""The held-out bound of a checkpoint, or of the weights a run starts from, outside of a run."""

import math
from collections.abc import Sequence

from illada_megatron.checkpoint.predictor import ONE_STAGE_LAYOUT, find_checkpoint, saved_config
from illada_megatron.checkpoint.sharded import load_weights
from illada_megatron.config import ParallelConfig, load_config
from illada_megatron.runtime import runtime, world_size_from_environment
from illada_megatron.training.setup import checked_tokenizer, validation_source
from illada_megatron.training.validation import HeldOut, evaluate


def layout_of_this_world(saved: ParallelConfig) -> list[str]:
    """Overrides that fit a configuration to the ranks there are: as much tensor parallelism of the saved run as divides
    them, one stage, the rest data parallel. The global batch, which nobody trains on, divides nothing."""
    tensor = math.gcd(saved.tensor_model_parallel_size, world_size_from_environment())
    return [
        *ONE_STAGE_LAYOUT,
        f"parallel.tensor_model_parallel_size={tensor}",
        *("training.pad_global_batch=true", "training.rampup_batch_size=null"),
    ]


def evaluate_checkpoint(config: str | None, overrides: Sequence[str], checkpoint: str | None) -> HeldOut | None:
    """Evaluate the newest checkpoint below `checkpoint`, with the configuration it was saved with, or, without one, the
    initial weights of `config` (a path or a preset). Every rank calls it; only rank 0 gets the figures.

    Raises ConfigError, CheckpointError or DataError.
    """
    from illada_megatron.model import build_model_chunks, fill_initial_weights

    info = find_checkpoint(checkpoint) if checkpoint is not None else None
    if info is None:
        resolved = load_config(config, overrides)
    else:
        resolved = saved_config(info, [*layout_of_this_world(saved_config(info).parallel), *overrides])
    with runtime(resolved) as run:
        source = validation_source(resolved, run, checked_tokenizer(resolved))
        models = build_model_chunks(resolved, run.device)
        if info is None:
            fill_initial_weights(models, resolved.model, resolved.training.seed)
        else:
            load_weights(info, resolved, models)
        figures = evaluate(models, source, resolved.validation.num_samples)
        return figures if run.is_main else None

"""The held-out bound of a checkpoint, or of the weights a run starts from, outside of a run."""

import math
from collections.abc import Sequence

from illada_megatron.checkpoint.predictor import ONE_STAGE_LAYOUT, find_checkpoint, saved_config
from illada_megatron.checkpoint.sharded import load_weights
from illada_megatron.config import ParallelConfig, load_config
from illada_megatron.runtime import runtime, world_size_from_environment
from illada_megatron.training.setup import checked_tokenizer, validation_source
from illada_megatron.training.validation import HeldOut, evaluate


def layout_of_this_world(wanted: ParallelConfig, overrides: Sequence[str] = ()) -> list[str]:
    """Overrides that fit a configuration to the ranks there are: its own sizes where these divide them, else one stage
    and as much of its tensor parallelism as divides them, the rest data parallel. Stages that `overrides` name, and
    `wanted` has, stay. The global batch, which nobody trains on, divides nothing."""
    ranks, stages = world_size_from_environment(), wanted.pipeline_model_parallel_size
    batch = ["training.pad_global_batch=true", "training.rampup_batch_size=null", "parallel.data_parallel_size=null"]
    if ranks % (wanted.tensor_model_parallel_size * stages) == 0:
        return batch
    asked = any(one.startswith("parallel.pipeline_model_parallel_size=") for one in overrides)
    tensor = math.gcd(wanted.tensor_model_parallel_size, max(1, ranks // stages) if asked else ranks)
    return [*batch, *ONE_STAGE_LAYOUT, f"parallel.tensor_model_parallel_size={tensor}"]


def evaluate_checkpoint(
    config: str | None, overrides: Sequence[str], checkpoint: str | None, ema: bool = False
) -> HeldOut | None:
    """Evaluate the newest checkpoint below `checkpoint`, with the configuration it was saved with, or, without one, the
    initial weights of `config` (a path or a preset). ema: the moving average of a checkpoint's weights.
    Every rank calls it; only rank 0 gets the figures.

    Raises ConfigError, CheckpointError or DataError.
    """
    from illada_megatron.model import build_model_chunks, fill_initial_weights

    info = find_checkpoint(checkpoint) if checkpoint is not None else None
    if info is None:
        resolved = load_config(config, overrides)
    else:
        resolved = saved_config(
            info, [*layout_of_this_world(saved_config(info, overrides).parallel, overrides), *overrides]
        )
    with runtime(resolved) as run:
        source = validation_source(resolved, run, checked_tokenizer(resolved))
        models = build_model_chunks(resolved, run.device)
        if info is None:
            fill_initial_weights(models, resolved.model, resolved.training.seeds.init)
        else:
            load_weights(info, resolved, models, ema)
        figures = evaluate(models, source, resolved.validation.num_samples)
        return figures if run.is_main else None

"""The held-out bound of a checkpoint, or of the weights a run starts from, outside of a run."""

from collections.abc import Sequence

from illada_megatron.checkpoint.predictor import find_checkpoint, saved_config
from illada_megatron.checkpoint.sharded import load_checkpoint
from illada_megatron.config import load_config
from illada_megatron.runtime import runtime
from illada_megatron.training.setup import validation_source
from illada_megatron.training.validation import HeldOut, evaluate

# The layout is this world's, not that of the run that saved the checkpoint.
_THIS_WORLD = "parallel.data_parallel_size=null"


def evaluate_checkpoint(config: str | None, overrides: Sequence[str], checkpoint: str | None) -> HeldOut | None:
    """Evaluate the newest checkpoint below `checkpoint`, with the configuration it was saved with, or, without one, the
    initial weights of `config` (a path or a preset). Every rank calls it; only rank 0 gets the figures.

    Raises ConfigError, CheckpointError or DataError.
    """
    from illada_megatron.model import build_model_chunks, fill_initial_weights

    info = find_checkpoint(checkpoint) if checkpoint is not None else None
    resolved = load_config(config, overrides) if info is None else saved_config(info, [_THIS_WORLD, *overrides])
    with runtime(resolved) as run:
        source = validation_source(resolved, run)
        models = build_model_chunks(resolved, run.device)
        if info is None:
            fill_initial_weights(models, resolved.model, resolved.training.seed)
        else:
            load_checkpoint(info, resolved, models, optimizer=None)
        figures = evaluate(resolved, run, models, source)
        return figures if run.is_main else None

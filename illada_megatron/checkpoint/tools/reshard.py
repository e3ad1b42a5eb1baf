"""A checkpoint rewritten for another layout, on one machine without a GPU, in pieces, by several processes.

This program's format has no layout: what a reshard changes there is the order of the bytes, so that each rank of the
new layout reads its files from front to back, and the configuration. Megatron's legacy format is one directory for
each model-parallel rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.megatron.stage_parameters import Implementation
from illada_megatron.checkpoint.store import RECORD
from illada_megatron.checkpoint.tools.opening import OpenCheckpoint
from illada_megatron.checkpoint.tools.rewriting import MEMORY_MB, Content, Format, Rewritten, rewrite
from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.config.layout import resolve_layout


@dataclass(frozen=True)
class LayoutChange:
    """The new sizes."""

    tensor: int | None = None
    """None: as the checkpoint has it; so is the next."""
    pipeline: int | None = None
    virtual: int | None = None
    """None: not interleaved."""
    data: int | None = None
    """None: any."""


def reshard(
    opened: OpenCheckpoint,
    target: Path,
    change: LayoutChange,
    format_: Format = "torch_dist",
    implementation: Implementation = "transformer_engine",
    memory_mb: int = MEMORY_MB,
    processes: int | None = None,
    verify: bool = True,
    overrides: Sequence[str] = (),
) -> Rewritten:
    """Write a checkpoint for another layout into the new directory `target`; see `rewrite`.

    overrides: `section.field=value` on the configuration, as a batch size that the new layout needs. Raises
    CheckpointError, ConfigError, OSError.
    """
    config, info = new_config(opened, change, overrides), opened.info
    content = Content(
        source=opened.source,
        name=str(info.path),
        step=info.step,
        config=config,
        progress=info.progress,
        fingerprints=info.fingerprints,
        verified=(info,) if verify else (),
        read_bytes=info.path.block_bytes,
    )
    try:
        return rewrite(content, target, format_, implementation, memory_mb, processes)
    except FileNotFoundError as error:
        if opened.kind != "torch_dist" or info.path.size(RECORD) is not None:
            raise  # Megatron's own have no record, and no run of ours deletes them
        raise CheckpointError(
            f"{info.path}: was deleted while it was read, and {target} is not written: the run that saves there keeps "
            "it no longer (checkpoint.keep_last): reshard a newer one, or one that stays (checkpoint.keep_every)"
        ) from error


def new_config(opened: OpenCheckpoint, change: LayoutChange, overrides: Sequence[str] = ()) -> RunConfig:
    """The checkpoint's configuration for the new layout. Raises ConfigError where the layout cannot work."""
    saved = opened.config.parallel
    tensor = change.tensor or saved.tensor_model_parallel_size
    pipeline = change.pipeline or saved.pipeline_model_parallel_size
    virtual = change.virtual if change.virtual and change.virtual > 1 else None
    values = [
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"parallel.virtual_pipeline_model_parallel_size={virtual or 'null'}",
        f"parallel.data_parallel_size={change.data or 'null'}",
    ]
    stages = (saved.pipeline_model_parallel_size, saved.model_chunks)
    written = saved.pipeline_layout not in ("auto", "even")  # of the old stages
    first = ["parallel.pipeline_layout=auto"] if written and (pipeline, virtual or 1) != stages else []
    if tensor == 1:
        values += ["parallel.sequence_parallel=false", "parallel.tp_comm_overlap=false"]
    if virtual is None or pipeline == 2:
        values.append("parallel.overlap_p2p_comm=null")
    config = load_config(opened.info.config, [*first, *overrides, *values], source=str(opened.info.path))
    if config.model != opened.config.model:
        raise ConfigError(f"{opened.info.path}: a reshard leaves the model as it is; leave out overrides of model.*")
    if config.training.precision != opened.config.training.precision:
        raise ConfigError(f"{opened.info.path}: a reshard leaves training.precision as it is")
    if change.data:
        try:
            resolve_layout(config, tensor * config.parallel.context_parallel_size * pipeline * change.data)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return config

"""Saving and loading through megatron-core's dist_checkpointing: every tensor under its name in the whole model."""

import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from illada_megatron.checkpoint import integrity, store
from illada_megatron.checkpoint.store import CheckpointError, CheckpointInfo
from illada_megatron.config import RunConfig

# The optimizer's state in the shape of the model's parameters: the only format that any TP, PP and DP can load.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}
# megatron-core's layers keep FP8 statistics there, nothing in fp32 and bf16. They are byte objects, which torch would
# read with pickle.
_EXTRA_STATE = "_extra_state"


def save_checkpoint(
    save_dir: Path,
    step: int,
    config: RunConfig,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    progress: Mapping[str, Any],
) -> Path:
    """Save model, optimizer and `progress` (plain values, the same on every rank) as the checkpoint of `step`.

    Every rank calls it. The pointer to the latest moves after all files are complete and durable. Returns the path.
    """
    path = store.step_directory(save_dir, step)
    if dist.get_rank() == 0:
        if path.exists():  # left by an interrupted save, or by a run that went on from an older checkpoint
            shutil.rmtree(path)
        path.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["progress"] = dict(progress)
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    dist_checkpointing.save(state, str(path), strategy)
    dist.barrier()
    files = integrity.seal(path)
    if dist.get_rank() == 0:
        store.finish(path, step, config.model_dump(mode="json"), files)
    dist.barrier()
    return path


def load_checkpoint(
    info: CheckpointInfo, config: RunConfig, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None
) -> dict[str, Any]:
    """Load a complete checkpoint into this rank's chunks and optimizer, whatever layout it was saved under.

    optimizer: None to load weights only. Returns the `progress` it was saved with. Raises CheckpointError where the
    checkpoint is of another model.
    """
    _check_model(info, config)
    store.check_metadata(info.path)
    _check_common(info.path / "common.pt")
    if optimizer is not None:
        _check_optimizer(info, config)
    state = _sharded_state(chunks, optimizer, is_loading=True)
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(info.path)),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    try:
        loaded = dist_checkpointing.load(state, str(info.path), strategy)
    except CheckpointException as error:
        raise CheckpointError(f"{info.path}: its files are damaged: {error}") from error
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        if unexpected or (missing := [key for key in missing if not key.endswith(_EXTRA_STATE)]):
            raise CheckpointError(f"{info.path}: keys that do not match the model: {missing}, {unexpected}")
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return loaded["progress"]


def _sharded_state(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, is_loading: bool
) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        entries = chunk.sharded_state_dict(metadata=dict(_METADATA))  # type: ignore[operator]
        models[f"model{index}"] = {key: entry for key, entry in entries.items() if not key.endswith(_EXTRA_STATE)}
    if optimizer is None:
        return models
    metadata = dict(_METADATA)
    return {**models, "optimizer": optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)}


def _check_model(info: CheckpointInfo, config: RunConfig) -> None:
    """A tensor of another size would be an obscure error, one of another meaning none at all."""
    saved, wanted = info.config["model"], config.model.model_dump(mode="json")
    irrelevant = ("max_sequence_length", "init_method_std", "embedding_init_std")
    different = [
        f"model.{key} is {saved.get(key)} in the checkpoint, {value} in the configuration"
        for key, value in wanted.items()
        if saved.get(key) != value and key not in irrelevant
    ]
    if different:
        raise CheckpointError(f"{info.path}: a checkpoint of another model:\n  " + "\n  ".join(different))


def _check_common(file: Path) -> None:
    """megatron-core reads it with torch's unpickler for plain values, whose refusal does not name the file."""
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{file}: the file is damaged, or holds more than plain values and is not a checkpoint's"
        ) from error


def _check_optimizer(info: CheckpointInfo, config: RunConfig) -> None:
    saved, wanted = info.config["parallel"]["use_distributed_optimizer"], config.parallel.use_distributed_optimizer
    if saved != wanted:
        raise CheckpointError(
            f"{info.path}: saved with parallel.use_distributed_optimizer={saved}, the configuration has {wanted}; "
            f"continue with {saved}"
        )
    precision, now = info.config["training"]["precision"], config.training.precision
    if precision != now:
        raise CheckpointError(
            f"{info.path}: saved with training.precision={precision}, the configuration has {now}; the optimizer's "
            f"main weights differ: continue with {precision}"
        )

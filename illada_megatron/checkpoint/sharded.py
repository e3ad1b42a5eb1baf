"""A run's state to and from a checkpoint's tensors: what a rank writes, and what it reads under whatever layout."""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from pydantic import ValidationError
from torch import Tensor, nn

from illada_megatron.checkpoint import fp8_state
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.names import EMA, MOMENTS, has_ema, tensor_name, weights_state
from illada_megatron.checkpoint.files.patience import patiently
from illada_megatron.checkpoint.files.tensors import PIECE_BYTES, TensorReader, row_pieces
from illada_megatron.checkpoint.state import (
    Held,
    Shard,
    adam_steps,
    fill_moments,
    held_parameters,
    optimizer_shards,
    optimizers,
    set_adam_steps,
    start_ema,
)
from illada_megatron.checkpoint.store import CheckpointInfo
from illada_megatron.config import ModelConfig, RunConfig
from illada_megatron.config.parameters import parameters

# Reading waits for the storage, not for the processor.
_READERS = 8
_SHOWN_SHAPES = 3


@dataclass(frozen=True)
class Part:
    """A box that this rank writes."""

    name: str
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    """A view of the live state."""


def parts_to_save(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, model: ModelConfig
) -> Iterator[Part]:
    """Every box of the model's and the optimizer's state that this rank has to write: over all ranks each element comes
    once. With the distributed optimizer a rank writes what it updates, else the ranks of a data-parallel group divide
    each tensor among themselves."""
    held = held_parameters(chunks, model)
    shards = optimizer_shards(optimizer, held) if optimizer is not None else {}
    sharded = optimizer is not None and any(isinstance(one, DistributedOptimizer) for one in optimizers(optimizer))
    for item in held:
        if not item.first_copy:
            continue
        name, shard = item.parameter.name, shards.get(item.parameter.name)
        if sharded and shard is None:
            continue
        start, stop = (shard.start, shard.stop) if sharded and shard else _own_share(item.tensor.numel())
        if item.is_quantized and shard is not None:  # always sharded: fp8.param_gather asks for it
            yield from _parts(item, name, shard.main.detach().view(-1).to(item.tensor.dtype), start, start, stop)
        else:
            yield from _parts(item, name, item.tensor.detach().view(-1), 0, start, stop)
        if shard is None:
            continue
        if shard.main.dtype != item.tensor.dtype:
            yield from _parts(item, tensor_name(name, "main"), shard.main.detach().view(-1), shard.start, start, stop)
        for state in (*MOMENTS, EMA):
            if state in shard.state:
                flat = shard.state[state].detach().view(-1)
                yield from _parts(item, tensor_name(name, state), flat, shard.start, start, stop)
    for name, tensor in fp8_state.tensors_to_save(chunks, model):
        yield Part(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def _parts(item: Held, name: str, flat: Tensor, begins_at: int, start: int, stop: int) -> Iterator[Part]:
    """flat: elements of the rank's flattened parameter, or of its like, from `begins_at` on."""
    for box in item.boxes(start, stop):
        view = flat[box.start - begins_at : box.stop - begins_at].view(box.shape)
        for row, rows in row_pieces(view, PIECE_BYTES):
            yield Part(name, item.parameter.shape, (box.offset[0] + row, *box.offset[1:]), rows)


def _own_share(numel: int) -> tuple[int, int]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return numel * rank // size, numel * (rank + 1) // size


def saved_progress(progress: dict[str, Any], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """What a checkpoint says of the run beside its tensors."""
    return {**progress, "optimizer_step": adam_steps(optimizer)}


def load_weights(info: CheckpointInfo, config: RunConfig, chunks: Sequence[nn.Module], ema: bool = False) -> None:
    """Load a complete checkpoint's weights, or their moving average, into this rank's chunks, in megatron-core's DDP or
    not, whatever layout it was saved under. Raises CheckpointError where the checkpoint is of another model, or has no
    moving average."""
    check_model(info, config)
    reader = TensorReader(info.path)
    state = weights_state(reader.tensors, reader.place, ema)
    _read_all(reader, [part for item in _held(chunks, config.model) for part in _weights(item, state)])


def load_checkpoint(
    info: CheckpointInfo, config: RunConfig, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer
) -> dict[str, Any] | None:
    """`load_weights`, with the optimizer's state: what a run goes on from.

    A moving average that the run keeps and the checkpoint lacks begins at the weights. Returns the `progress` it was
    saved with, None where the checkpoint is of weights alone (a run begins with them).
    """
    end_gathers(chunks)
    check_model(info, config)
    reader, held = TensorReader(info.path), _held(chunks, config.model)
    shards = optimizer_shards(optimizer, held)
    steps = None if info.progress is None else info.progress["optimizer_step"]
    wanted = []
    for item in held:
        if (shard := shards.get(item.parameter.name)) is not None:
            if steps is not None:
                fill_moments(shard)
            wanted += _optimizer_parts(reader, item, shard, steps or 0)
    _read_all(reader, wanted)
    if not has_ema(reader.tensors):
        _start_averages(shards.values())
    # before weights are quantised with its factors
    fp8_state.load(reader, [getattr(chunk, "module", chunk) for chunk in chunks], config.model)
    spread_main_weights(chunks, optimizer)
    if steps is not None:
        set_adam_steps(optimizer, steps)
    return info.progress


def _start_averages(shards: Iterable[Shard]) -> None:
    for shard in shards:
        if EMA in shard.state:
            start_ema(shard)


def _held(chunks: Sequence[nn.Module], model: ModelConfig) -> list[Held]:
    return held_parameters([getattr(chunk, "module", chunk) for chunk in chunks], model)


def _weights(item: Held, state: str) -> list[Part]:
    if item.is_quantized:
        raise CheckpointError(
            f"{item.parameter.name} is kept in FP8 and has no main weight to be loaded into: set fp8.param_gather=false"
        )
    saved = tensor_name(item.parameter.name, state)
    return list(_parts(item, saved, item.tensor.detach().view(-1), 0, 0, item.tensor.numel()))


def _optimizer_parts(reader: TensorReader, item: Held, shard: Shard, steps: int) -> list[Part]:
    """What the optimizer of this rank has to know; the weights follow from it."""
    name = item.parameter.name
    main = tensor_name(name, "main")
    tensors = [(main if main in reader.tensors else name, shard.main)]
    if steps:
        tensors += [(tensor_name(name, moment), shard.state[moment]) for moment in MOMENTS]
    if EMA in shard.state and has_ema(reader.tensors):
        tensors.append((tensor_name(name, EMA), shard.state[EMA]))
    return [
        part
        for saved, tensor in tensors
        for part in _parts(item, saved, tensor.detach().view(-1), shard.start, shard.start, shard.stop)
    ]


def _read_all(reader: TensorReader, parts: Sequence[Part]) -> None:
    def read(part: Part) -> None:
        target = part.tensor
        if (known := reader.tensors.get(part.name)) is not None and known.shape != part.whole_shape:
            raise CheckpointError(
                f"{reader.place}: {part.name} has shape {known.shape}, this model's is {part.whole_shape}"
            )
        shape = tuple(target.shape)
        if target.device.type == "cpu":
            patiently(lambda: reader.read(part.name, part.offset, shape, out=target))
        else:
            target.copy_(patiently(lambda: reader.read(part.name, part.offset, shape)))

    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(read, parts):
            pass


def end_gathers(chunks: Sequence[nn.Module]) -> None:
    """Wait for weights that are still being gathered. They would be written over those that are read, and a forced
    gather takes one that is under way for its own: the ranks would go on with each other's old weights."""
    for chunk in chunks:
        for group in chunk.bucket_groups:  # type: ignore[union-attr]
            if group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)


def spread_main_weights(chunks: Sequence[nn.Module], optimizer: MegatronOptimizer) -> None:
    """From the main weights that each rank has read to the weights that all compute with, as after a step."""
    for one in optimizers(optimizer):
        if hasattr(one, "_copy_main_params_to_model_params"):
            one._copy_main_params_to_model_params()
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:  # type: ignore[union-attr]
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
        # megatron-core transposes gathered FP8 weights for the backward pass behind each gather but a forced one of
        # overlap_param_gather
        if quantized := [one for one in chunk.parameters() if is_float8tensor(one)]:
            post_all_gather_processing(quantized)


def check_model(info: CheckpointInfo, config: RunConfig) -> None:
    """A tensor of another size would be an obscure error, one of another meaning none at all."""
    wanted = config.model.model_dump(mode="json")
    # a field that came later has its default in earlier checkpoints
    saved = ModelConfig().model_dump(mode="json") | info.config["model"]
    irrelevant = ("max_sequence_length", "init_method", "init_method_std", "embedding_init_std")
    different = [key for key, value in wanted.items() if saved.get(key) != value and key not in irrelevant]
    shapes = _other_shapes(info, config.model) if different else []
    if shapes or (different and "model" not in config.checkpoint.allow_mismatch):
        lines = [
            f"model.{key} is {saved.get(key)} in the checkpoint, {wanted[key]} in the configuration"
            for key in different
        ]
        theirs = " ".join(f"model.{key}={json.dumps(saved.get(key))}" for key in different)
        other = "" if shapes else ', or set checkpoint.allow_mismatch=["model"] where that is meant'
        raise CheckpointError(
            f"{info.path}: a checkpoint of another model:\n  "
            + "\n  ".join([*lines, *shapes[:_SHOWN_SHAPES]])
            + f"\n  take the checkpoint's: {theirs}{other}"
        )


def _other_shapes(info: CheckpointInfo, model: ModelConfig) -> list[str]:
    """What keeps weights from being loaded, whatever is allowed."""
    try:
        saved = ModelConfig.model_validate(info.config["model"])
    except ValidationError as error:
        raise CheckpointError(f"{info.path}: its model is not one of this program: {error}") from error
    shapes = {one.name: one.shape for one in parameters(saved)}
    return [
        f"{one.name} has shape {shapes.get(one.name, 'none')}, this model's is {one.shape}"
        for one in parameters(model)
        if shapes.get(one.name) != one.shape
    ]

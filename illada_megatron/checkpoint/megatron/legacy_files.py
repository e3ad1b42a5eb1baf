"""Megatron's legacy checkpoints as whole tensors with canonical names; which bytes of which file each part is."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.metadata import TensorInfo
from illada_megatron.checkpoint.files.names import MOMENTS, WEIGHT, split_name, tensor_name
from illada_megatron.checkpoint.files.restricted_unpickler import data_offset, load_plain
from illada_megatron.checkpoint.files.tensors import bytes_of
from illada_megatron.checkpoint.megatron import legacy_layout as layout
from illada_megatron.checkpoint.megatron.stage_parameters import HeldParameter, chunks_of_stages
from illada_megatron.config import RunConfig
from illada_megatron.config.layout import pipeline_split
from illada_megatron.config.parameters import Parameter, parameters

_TE_MARK = "layer_norm_weight"


@dataclass(frozen=True)
class Slot:
    """Where a model-parallel rank's part of a tensor lies: row after row."""

    file: Path
    offset: int
    dtype: torch.dtype


Slots = dict[str, list[list[Slot]]]
"""By the tensor's name, [tensor-parallel rank] -> its places: several where the last stage has a copy of the embedding,
and where the distributed optimizer has one of an fp32 model's weights."""


@dataclass(frozen=True)
class LegacyFile:
    """A file whose elements are to be written."""

    name: str
    """From the checkpoint's directory."""
    spans: tuple[tuple[int, int, torch.dtype], ...]
    """First byte and end of each tensor's elements, in ascending order, and what they are: Adam's moments are fp32
    here, whatever they were."""


@dataclass(frozen=True)
class LegacyStage:
    """The files of a kind of all tensor-parallel ranks of a pipeline stage; they hold the same tensors in one order."""

    files: tuple[LegacyFile, ...]
    """By tensor-parallel rank."""
    tensors: tuple[tuple[str, Parameter], ...]
    """Name in the checkpoint, and whose it is, in the order of the files."""


class LegacySource:
    """Whole tensors (`sources.Source`) put together from the model-parallel ranks' files."""

    def __init__(self, config: RunConfig, slots: Slots) -> None:
        self.slots = slots
        self._parameters = {parameter.name: parameter for parameter in parameters(config.model)}
        self._tensor_parallel = config.parallel.tensor_model_parallel_size
        self.tensors = {
            name: TensorInfo(self._parameter(name).shape, ranks[0][0].dtype, []) for name, ranks in slots.items()
        }

    def read(
        self,
        name: str,
        offset: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `tensors.TensorReader.read`. Raises CheckpointError where copies of it differ."""
        if name not in self.slots:
            raise CheckpointError(f"the checkpoint holds no tensor {name}")
        info = self.tensors[name]
        offset = tuple(offset if offset is not None else (0,) * len(info.shape))
        shape = tuple(shape if shape is not None else info.shape)
        result = torch.empty(shape, dtype=info.dtype) if out is None else out.view(shape)
        copies = len(self.slots[name][0])
        self._fill(name, offset, shape, result, 0)
        for copy in range(1, copies):
            other = torch.empty_like(result)
            self._fill(name, offset, shape, other, copy)
            if not torch.equal(result.view(torch.uint8), other.view(torch.uint8)):
                first, second = (self.slots[name][0][number].file for number in (0, copy))
                raise CheckpointError(f"{second}: its copy of {name} is not that of {first}; the checkpoint is damaged")
        return result

    def _fill(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...], result: Tensor, copy: int) -> None:
        parameter = self._parameter(name)
        ranks = 1 if parameter.split is None else self._tensor_parallel
        for rank in range(ranks):
            slot = self.slots[name][rank][copy]
            for first_row, held_shape, held_offset in parameter.held(rank, self._tensor_parallel):
                low = tuple(map(max, offset, held_offset))
                high = tuple(
                    min(a + n, b + m) for a, n, b, m in zip(offset, shape, held_offset, held_shape, strict=True)
                )
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                rows = (high[0] - low[0], *held_shape[1:])
                begin = (first_row + low[0] - held_offset[0]) * math.prod(held_shape[1:])
                target = result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))]
                if tuple(target.shape) == rows and target.is_contiguous() and target.dtype == slot.dtype:
                    _read(slot, begin, target)
                    continue
                block = torch.empty(rows, dtype=slot.dtype)
                _read(slot, begin, block)
                kept = tuple(slice(a - o, b - o) for a, b, o in zip(low[1:], high[1:], held_offset[1:], strict=True))
                target.copy_(block[(slice(None), *kept)])

    def _parameter(self, name: str) -> Parameter:
        return self._parameters[split_name(name).parameter]


def _read(slot: Slot, begin: int, target: Tensor) -> None:
    """Fill a contiguous tensor with the elements from `begin` on."""
    left, at = bytes_of(target), slot.offset + begin * slot.dtype.itemsize
    descriptor = os.open(slot.file, os.O_RDONLY)
    try:
        while left:
            count = os.preadv(descriptor, [left], at)
            if count == 0:
                raise CheckpointError(f"{slot.file}: ends at byte {at}, {len(left)} more were expected")
            left, at = left[count:], at + count
    finally:
        os.close(descriptor)


def find_slots(directory: Path, config: RunConfig) -> tuple[Slots, int]:
    """Where everything lies in an iteration's `directory`, and how many steps its optimizer has done (0: none, or it
    holds no optimizer).

    config: of the model and the layout that it was saved under. Raises CheckpointError where a file is not as Megatron
    writes it for them; OSError.
    """
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.model_chunks
    split = pipeline_split(config)
    slots: Slots = {}
    steps: set[int] = set()
    stages = {
        implementation: chunks_of_stages(config.model, split, implementation)
        for implementation in ("local", "transformer_engine")
    }
    for pipeline_rank in range(pipeline):
        for rank in range(tensor):
            file = directory / layout.rank_directory(rank, pipeline_rank, pipeline) / layout.MODEL_FILE
            state = load_plain(file)
            weights = [_entry(state, layout.model_key(chunk, virtual), file) for chunk in range(virtual)]
            fused = any(_TE_MARK in name for name in weights[0])
            held = stages["transformer_engine" if fused else "local"][pipeline_rank]
            for name, slot in (
                *_weights(file, weights, held, tensor),
                *_optimizer(file, state, config, held, pipeline_rank, steps),
            ):
                ranks = slots.setdefault(name, [[] for _ in range(tensor)])
                ranks[rank].append(slot)
    if len(steps) > 1:
        raise CheckpointError(f"{directory}: its optimizers have done {sorted(steps)} steps, expected the same number")
    return slots, next(iter(steps), 0)


def stages_to_write(directory: Path, config: RunConfig) -> list[LegacyStage]:
    """What belongs into the files of a `legacy_skeleton`, an iteration's `directory`. Raises as `find_slots`."""
    by_name = {parameter.name: parameter for parameter in parameters(config.model)}
    tensor_parallel = config.parallel.tensor_model_parallel_size
    held: dict[tuple[Path, ...], list[tuple[str, tuple[Slot, ...]]]] = {}
    for name, ranks in find_slots(directory, config)[0].items():
        for slots in zip(*ranks, strict=True):
            held.setdefault(tuple(slot.file for slot in slots), []).append((name, slots))
    stages = []
    for files, tensors in held.items():
        tensors.sort(key=lambda entry: entry[1][0].offset)
        named = tuple((name, by_name[split_name(name).parameter]) for name, _ in tensors)
        sizes = [math.prod(parameter.held_shape(tensor_parallel)) for _, parameter in named]
        spans = [
            tuple(
                (slots[rank].offset, slots[rank].offset + size * slots[rank].dtype.itemsize, slots[rank].dtype)
                for size, (_, slots) in zip(sizes, tensors, strict=True)
            )
            for rank in range(tensor_parallel)
        ]
        relative = [str(file.relative_to(directory)) for file in files]
        stages.append(LegacyStage(tuple(map(LegacyFile, relative, spans)), named))
    return stages


def _weights(
    file: Path, weights: list[dict[str, Any]], held: list[list[HeldParameter]], tensor: int
) -> Iterator[tuple[str, Slot]]:
    for chunk, (state, wanted) in enumerate(zip(weights, held, strict=True)):
        # Transformer Engine keeps statistics of FP8 under such names
        found = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
        expected = {one.local_name for one in wanted}
        if found.keys() != expected:
            missing, more = sorted(expected - found.keys()), sorted(found.keys() - expected)
            raise CheckpointError(
                f"{file}: chunk {chunk} lacks {missing[:3] or 'nothing'} and has {more[:3] or 'nothing'} beside what "
                "this model has: give the model and the layout that it was saved with"
            )
        for one in wanted:
            yield one.parameter.name, _slot(file, found[one.local_name], one, tensor)


def _optimizer(
    file: Path,
    state: dict[str, Any],
    config: RunConfig,
    held: list[list[HeldParameter]],
    pipeline_rank: int,
    steps: set[int],
) -> Iterator[tuple[str, Slot]]:
    """The optimizer's tensors; its number of steps is added to `steps`."""
    optimizer = state.get("optimizer")
    if optimizer is None:
        return
    if not isinstance(optimizer, dict):
        raise CheckpointError(f"{file}: has several optimizers (a chain), expected one: Adam for all parameters")
    inner = optimizer if "param_groups" in optimizer else _entry(optimizer, "optimizer", file)
    groups = _entry(inner, "param_groups", file)
    tensor = config.parallel.tensor_model_parallel_size
    if "state" not in inner:
        steps.update(int(group["step"]) for group in groups if group.get("step") is not None)
        beside = file.with_name(layout.DISTRIBUTED_OPTIMIZER_FILE)
        yield from _distributed(beside, config, held, pipeline_rank)
        return
    mains = optimizer.get("fp32_from_fp16_params", optimizer.get("fp32_from_fp16"))
    # biases and norms are not decayed and make a group of their own
    ordered = [one for chunk in held for one in chunk]
    for number, group in enumerate(groups):
        vectors = group.get("wd_mult", 1.0) == 0.0
        members = [one for one in ordered if (len(one.parameter.shape) == 1) == vectors]
        ids = group["params"]
        if ids and len(ids) != len(members):
            raise CheckpointError(
                f"{file}: group {number} of its optimizer has {len(ids)} parameters, expected {len(members)}: all "
                f"{'vectors' if vectors else 'matrices'} of the stage; another division into groups cannot be read"
            )
        for index, (identity, one) in enumerate(zip(ids, members, strict=bool(ids))):
            moments = inner["state"].get(identity)
            if moments is None:
                continue
            for moment in MOMENTS:
                yield tensor_name(one.parameter.name, moment), _slot(file, moments[moment], one, tensor)
            if mains is not None:
                yield tensor_name(one.parameter.name, "main"), _slot(file, mains[number][index], one, tensor)
            step = moments.get("step", group.get("step"))
            steps.add(_scalar(file, step) if isinstance(step, Tensor) else int(step or 0))


def _distributed(
    file: Path, config: RunConfig, held: list[list[HeldParameter]], pipeline_rank: int
) -> Iterator[tuple[str, Slot]]:
    """The state of the distributed optimizer: one flat tensor of each kind for a chunk's gradient buffer."""
    state = load_plain(file)
    if not state.get("buckets_coalesced"):
        raise CheckpointError(f"{file}: written by Megatron before February 2024: load and save it with a later one")
    for chunk, wanted in enumerate(held):
        buffers = list(_entry(state, chunk, file).values())
        if len(buffers) != 1:
            raise CheckpointError(f"{file}: chunk {chunk} has {len(buffers)} kinds of parameters, expected one dtype")
        positions, length = layout.buffer_positions(wanted, config, pipeline_rank, chunk)
        for key, name in layout.BUFFER_STATES.items():
            flat = _entry(buffers[0], key, file)
            if flat.numel() != length or flat.dtype != torch.float32:
                raise CheckpointError(
                    f"{file}: {key} of chunk {chunk} has {flat.numel()} elements of {flat.dtype}, expected {length} of "
                    "torch.float32: its buffers are laid out in a way that is not known here; load it with Megatron "
                    "and save it without the distributed optimizer, or as torch_dist"
                )
            begin = data_offset(flat, file, key)
            # of an fp32 model megatron-core takes the weights themselves from here, after those of the model's file
            state_name = WEIGHT if name == "main" and config.training.precision == "fp32" else name
            for one, position in zip(wanted, positions, strict=True):
                where = Slot(file, begin + position * flat.itemsize, flat.dtype)
                yield tensor_name(one.parameter.name, state_name), where


def _slot(file: Path, tensor: Any, one: HeldParameter, tensor_parallel: int) -> Slot:
    expected = one.parameter.held_shape(tensor_parallel)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != expected:
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CheckpointError(
            f"{file}: {one.local_name} or its optimizer state is {found}, expected a tensor of shape {expected}: give "
            "the model and the layout that it was saved with"
        )
    return Slot(file, data_offset(tensor, file, one.local_name), tensor.dtype)


def _scalar(file: Path, tensor: Tensor) -> int:
    value = torch.empty(1, dtype=tensor.dtype)
    _read(Slot(file, data_offset(tensor, file, "step"), tensor.dtype), 0, value)
    return int(value)


def _entry(state: Any, key: Any, file: Path) -> Any:
    if not isinstance(state, dict) or key not in state:
        keys = list(state)[:6] if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{file}: expected an entry {key!r}, found {keys}: not as Megatron writes it")
    return state[key]

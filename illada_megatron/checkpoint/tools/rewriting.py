"""A checkpoint written anew from any source, in pieces, by several processes: what reshard and average share."""

import importlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from illada_megatron.checkpoint import store
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.integrity import FileRecord, checksum
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.names import EMA, FP8, OPTIMIZER_STATE, WEIGHT, split_name, tensor_name
from illada_megatron.checkpoint.files.new_directory import staged
from illada_megatron.checkpoint.files.storage import Folder
from illada_megatron.checkpoint.files.tensors import PIECE_BYTES, WrittenPart, write_metadata
from illada_megatron.checkpoint.megatron import legacy_layout
from illada_megatron.checkpoint.megatron.legacy_files import LegacyFile, stages_to_write
from illada_megatron.checkpoint.megatron.legacy_skeleton import DTYPES, write_skeleton
from illada_megatron.checkpoint.megatron.stage_parameters import Implementation, parameters_of_stages
from illada_megatron.checkpoint.store import CheckpointInfo
from illada_megatron.checkpoint.tools.copying import DistSink, LegacySink, Sink, copy_tensors
from illada_megatron.checkpoint.tools.processes import default_processes, pool
from illada_megatron.checkpoint.tools.sources import Source
from illada_megatron.config import RunConfig
from illada_megatron.config.layout import pipeline_split
from illada_megatron.config.parameters import EMBEDDING, Parameter

Format = Literal["torch_dist", "legacy"]
MEMORY_MB = 512
# What a process holds of a block at a time: as it is read, a rank's part of it, what a piece needs to be cut.
_COPIES_OF_A_BLOCK = 4
# Of each tensor-parallel rank's file of this program's format: enough files for many processes, not too many to list.
_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Content:
    """What a new checkpoint holds."""

    source: Source
    name: str
    """What errors call the source."""
    step: int
    config: RunConfig
    progress: dict[str, Any] | None
    fingerprints: Mapping[str, Any]
    verified: Sequence[CheckpointInfo]
    """Checkpoints whose files are compared with their checksums while they are read."""
    read_bytes: int = LocalFolder.block_bytes
    """What is best read at once where the source lies."""
    copies_of_a_block: int = _COPIES_OF_A_BLOCK
    """Memory that reading and writing a block takes, in blocks."""


@dataclass(frozen=True)
class Rewritten:
    """What was written."""

    path: Path
    step: int
    tensors: int
    nbytes: int
    """Of the tensors, each once."""
    without_ema: bool = False
    """The source has a moving average of the weights, and Megatron's format has no place for it."""
    without_fp8_state: bool = False
    """The source has delayed scaling's factors and largest values; in Megatron's format they would be Transformer
    Engine's pickled bytes."""


@dataclass(frozen=True)
class _Job:
    """What every process knows."""

    source: Source
    tensor_parallel: int
    block_bytes: int
    read_bytes: int
    """Of a block at a time."""
    target: Path


@dataclass(frozen=True)
class _Copy:
    """Tensors that one process copies, one behind the other."""

    number: int
    named: tuple[tuple[str, Parameter], ...]
    nbytes: int
    files: tuple[LegacyFile, ...] = ()
    """By tensor-parallel rank, of the legacy format; none: this program's format is written."""


@dataclass(frozen=True)
class _Check:
    """A file to compare with its checksum."""

    place: Folder
    name: str
    record: FileRecord

    @property
    def nbytes(self) -> int:
        return self.record["bytes"]


def rewrite(
    content: Content,
    target: Path,
    format_: Format = "torch_dist",
    implementation: Implementation = "transformer_engine",
    memory_mb: int = MEMORY_MB,
    processes: int | None = None,
) -> Rewritten:
    """Write a checkpoint below the new directory `target`, for the layout of its configuration.

    implementation: names of the legacy format's layers. memory_mb: of tensors that all processes together hold at a
    time. `target` is there as a whole or not at all, whenever this process ends; sources are only read. Raises
    CheckpointError, OSError.
    """
    config, step = content.config, content.step
    if format_ == "torch_dist":
        store.check_name(LocalFolder(target))
    states = [state for state in OPTIMIZER_STATE if _has(content.source, state)]
    without_ema = format_ == "legacy" and EMA in states
    tasks = _copies(content, [state for state in states if not (without_ema and state == EMA)])
    without_fp8_state = False
    if fp8_state := _fp8_state(content.source, len(tasks)):
        without_fp8_state = format_ == "legacy"
        tasks += [] if without_fp8_state else [fp8_state]
    checks = [
        _Check(info.path, name, record) for info in content.verified for name, record in sorted(info.files.items())
    ]
    tensors, nbytes = sum(len(task.named) for task in tasks), sum(task.nbytes for task in tasks)
    count = processes or default_processes()
    block_bytes = min(PIECE_BYTES, memory_mb * 10**6 // (count * content.copies_of_a_block))
    with staged(target, _written_bytes(tasks, config, format_)) as directory:
        if format_ == "legacy":
            path = legacy_layout.iteration_directory(directory, step)
        else:
            path = directory / store.step_directory(LocalFolder(directory), step).name
        path.mkdir()
        if format_ == "legacy":
            tasks = _legacy_copies(path, content, implementation)
        tensor_parallel, read_bytes = config.parallel.tensor_model_parallel_size, min(block_bytes, content.read_bytes)
        job = _Job(content.source, tensor_parallel, block_bytes, read_bytes, path)
        with pool(job, count) as workers:
            if format_ == "torch_dist":  # imported meanwhile: it takes seconds, and would at the end
                threading.Thread(target=importlib.import_module, args=("torch.distributed.checkpoint",)).start()
            order = _interleaved(checks, tasks)
            results = workers.run("writing", _do, order, [task.nbytes for task in order])
            parts = [part for result in results for part in result]
        if format_ == "torch_dist":
            files = write_metadata(LocalFolder(path), parts)
        else:
            files = dict(sorted(entry for part in parts for entry in part.files.items()))
        _finish(path, content, files, format_)
    return Rewritten(target, step, tensors, nbytes, without_ema, without_fp8_state)


def _has(source: Source, state: str) -> bool:
    return any(name.startswith(tensor_name("", state)) for name in source.tensors)


def _copies(content: Content, states: Sequence[str]) -> list[_Copy]:
    """All tensors of the source in the order in which the new layout's ranks read them: a stage after the other, its
    weights before its optimizer's state."""
    source, config = content.source, content.config
    held = source.tensors
    if states and "main" not in states and config.training.precision != "fp32":
        raise CheckpointError(
            f"{content.name}: holds Adam's moments of a {config.training.precision} model but no fp32 main weights: a "
            "run could not go on exactly from it; save it with main weights (in Megatron, without "
            "--use-precision-aware-optimizer), or without the optimizer"
        )
    stages = parameters_of_stages(config.model, pipeline_split(config))
    limit = _FILE_BYTES * config.parallel.tensor_model_parallel_size
    tasks: list[_Copy] = []
    for stage in stages:
        ordered = [(tensor_name(one.name, WEIGHT), one) for one in stage]
        ordered += [(tensor_name(one.name, state), one) for one in stage for state in states]
        group: list[tuple[str, Parameter]] = []
        for name, parameter in ordered:
            info = held.get(name)
            if info is None or info.shape != parameter.shape:
                found = "none" if info is None else f"one of shape {info.shape}"
                raise CheckpointError(
                    f"{content.name}: holds {found} of {name}, expected shape {parameter.shape}: it is incomplete, or "
                    "of another model than its configuration says"
                )
            group.append((name, parameter))
            if _nbytes(source, group) >= limit:
                tasks.append(_Copy(len(tasks), tuple(group), _nbytes(source, group)))
                group = []
        if group:
            tasks.append(_Copy(len(tasks), tuple(group), _nbytes(source, group)))
    return tasks


def _fp8_state(source: Source, number: int) -> _Copy | None:
    """All of delayed scaling's state: every rank of a tensor parallel group has the whole of a layer's."""
    named = tuple(
        (name, Parameter(name, info.shape, split=None))
        for name, info in source.tensors.items()
        if split_name(name).state.startswith(FP8)
    )
    return _Copy(number, named, _nbytes(source, named)) if named else None


def _legacy_copies(path: Path, content: Content, implementation: Implementation) -> list[_Copy]:
    """Write the files of the legacy format without their elements; the elements of a stage's are a task."""
    progress = content.progress or {"consumed_samples": 0, "optimizer_step": 0}
    with_optimizer = any(name.startswith("optimizer.") for name in content.source.tensors)
    write_skeleton(path, content.config, content.step, progress, implementation, with_optimizer)
    stages = stages_to_write(path, content.config)
    tasks = [
        _Copy(number, stage.tensors, _nbytes(content.source, stage.tensors), stage.files)
        for number, stage in enumerate(stages)
    ]
    return sorted(tasks, key=lambda task: -task.nbytes)  # the longest first: they are few


def _nbytes(source: Source, named: Sequence[tuple[str, Parameter]]) -> int:
    return sum(source.tensors[name].nbytes for name, _ in named)


def _interleaved(checks: Sequence[_Check], copies: Sequence[_Copy]) -> list[_Check | _Copy]:
    """Each file is checked shortly before its tensors are copied, as far as both lie in the same order: it is then read
    from the disk once."""
    placed: list[tuple[float, int, _Check | _Copy]] = []
    both: tuple[Sequence[_Check | _Copy], ...] = (checks, copies)
    for priority, tasks in enumerate(both):
        total, before = max(1, sum(task.nbytes for task in tasks)), 0
        for task in tasks:
            placed.append((before / total, priority, task))
            before += task.nbytes
    return [task for _, _, task in sorted(placed, key=lambda entry: entry[:2])]


def _do(job: _Job, task: _Check | _Copy) -> list[WrittenPart]:
    """A process's work."""
    if isinstance(task, _Check):
        _check(task)
        return []
    sink: Sink
    sink = LegacySink(job.target, task.files) if task.files else DistSink(job.target, task.number, job.tensor_parallel)
    return copy_tensors(job.source, task.named, job.tensor_parallel, job.block_bytes, job.read_bytes, sink)


def _check(task: _Check) -> None:
    found = FileRecord(bytes=task.nbytes, xxh3_128=checksum(task.place, task.name, task.nbytes))
    if found != task.record:
        raise CheckpointError(
            f"{task.place}/{task.name}: its bytes have changed: checksum {found['xxh3_128']}, expected "
            f"{task.record['xxh3_128']}; take another checkpoint, or --no-verify to read this one as it is"
        )


def _finish(path: Path, content: Content, files: dict[str, FileRecord], format_: Format) -> None:
    place, step = LocalFolder(path), content.step
    dumped = content.config.model_dump(mode="json")
    store.finish(place, step, dumped, content.progress, files, content.fingerprints)
    if format_ == "legacy":
        place.parent.replace(legacy_layout.TRACKER, f"{step}\n".encode())
    else:
        store.move_pointer(place)


def _written_bytes(tasks: Sequence[_Copy], config: RunConfig, format_: Format) -> int:
    """About; legacy: each tensor-parallel rank has its own norms, the last stage its own embedding, the distributed
    optimizer its own weights of an fp32 model."""
    if format_ == "torch_dist":
        return sum(task.nbytes for task in tasks)
    held = [(name, one) for task in tasks for name, one in task.named]
    itemsize = DTYPES[config.training.precision].itemsize  # of weights; the optimizer's state is fp32
    total = sum(math.prod(one.shape) * (itemsize if name == one.name else 4) for name, one in held)
    if config.model.tie_word_embeddings and config.parallel.pipeline_model_parallel_size > 1:
        total += sum(math.prod(one.shape) * 16 for name, one in held if name == EMBEDDING)
    if config.parallel.use_distributed_optimizer and config.training.precision == "fp32":
        total += sum(math.prod(one.shape) * 4 for name, one in held if name == one.name)
    return total

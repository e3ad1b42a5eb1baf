"""Tensors copied piece by piece from any checkpoint into another's layout."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from illada_megatron.checkpoint.files.integrity import RecordedFile
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.tensors import TensorWriter, WrittenPart, bytes_of
from illada_megatron.checkpoint.megatron.legacy_files import LegacyFile
from illada_megatron.checkpoint.tools.processes import moved
from illada_megatron.checkpoint.tools.sources import Source
from illada_megatron.config.parameters import Parameter


@dataclass(frozen=True)
class Target:
    """What of a block a tensor-parallel rank gets."""

    rank: int
    row: int
    """First row in the rank's own tensor."""
    columns: tuple[int, int] | None
    """Of the block; None: all."""


@dataclass(frozen=True)
class Block:
    """A box of a whole tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    targets: tuple[Target, ...]

    def rows(self, itemsize: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """(first row, rows) of `nbytes` at most (one row at least), one behind the other."""
        count = max(1, nbytes // (math.prod(self.shape[1:]) * itemsize))
        for row in range(0, self.shape[0], count):
            yield row, min(count, self.shape[0] - row)


def blocks(parameter: Parameter, tensor_parallel: int, itemsize: int, block_bytes: int) -> Iterator[Block]:
    """The whole of `parameter` in blocks of at most `block_bytes` (one row at least), rank after rank, so that each
    rank's part comes in the order of its own rows. Columns are cut from whole rows: all ranks' come together."""
    row_elements = math.prod(parameter.shape[1:])
    limit = max(1, block_bytes // (row_elements * itemsize))
    if parameter.split in (None, "columns"):
        rows, width = parameter.shape[0], parameter.held_shape(tensor_parallel)[-1]
        divided = parameter.split is not None
        for row in range(0, rows, limit):
            targets = tuple(
                Target(rank, row, (rank * width, (rank + 1) * width) if divided and tensor_parallel > 1 else None)
                for rank in range(tensor_parallel)
            )
            offset = (row, *(0 for _ in parameter.shape[1:]))
            yield Block(offset, (min(limit, rows - row), *parameter.shape[1:]), targets)
        return
    for rank in range(tensor_parallel):
        for first_row, shape, offset in parameter.held(rank, tensor_parallel):
            for row in range(0, shape[0], limit):
                targets = (Target(rank, first_row + row, None),)
                count = min(limit, shape[0] - row)
                yield Block((offset[0] + row, *offset[1:]), (count, *shape[1:]), targets)


class Sink(Protocol):
    """Where tensors are written; used by one process."""

    def write(self, name: str, parameter: Parameter, block: Block, row: int, tensor: Tensor) -> None:
        """The rows of a block from `row` on, of tensor `name`, which belongs to `parameter`; they come in their order,
        one block behind the other."""

    def close(self) -> list[WrittenPart]: ...


class DistSink:
    """This program's format: one file for each tensor-parallel rank, what a rank reads one behind the other."""

    def __init__(self, path: Path, task: int, tensor_parallel: int) -> None:
        place = LocalFolder(path)
        numbers = range(task * tensor_parallel, (task + 1) * tensor_parallel)
        self._writers = [TensorWriter(place, number) for number in numbers]

    def write(self, name: str, parameter: Parameter, block: Block, row: int, tensor: Tensor) -> None:
        for target in block.targets:
            if parameter.split is None and target.rank > 0:
                continue  # all ranks read the same
            writer, part = self._writers[target.rank], tensor
            shape, offset = block.shape, block.offset
            if target.columns:
                low, high = target.columns
                part, shape, offset = tensor[:, low:high].contiguous(), (shape[0], high - low), (offset[0], low)
            if row == 0:
                writer.begin(name, tensor.dtype, shape, offset, parameter.shape)
            writer.append(part)

    def close(self) -> list[WrittenPart]:
        return [writer.close() for writer in self._writers]


class LegacySink:
    """Files of Megatron's legacy format, one for each tensor-parallel rank, in place of those that hold everything but
    their elements (`legacy_skeleton`): written anew from the first byte to the last."""

    def __init__(self, path: Path, files: Sequence[LegacyFile]) -> None:
        self._files = [_Filled(path, file) for file in files]

    def write(self, _: str, __: Parameter, block: Block, row: int, tensor: Tensor) -> None:
        for target in block.targets:
            part = tensor if target.columns is None else tensor[:, slice(*target.columns)].contiguous()
            if target.row + row == 0:
                self._files[target.rank].begin()
            self._files[target.rank].append(part)

    def close(self) -> list[WrittenPart]:
        return [file.close() for file in self._files]


class _Filled:
    """One of them."""

    def __init__(self, path: Path, file: LegacyFile) -> None:
        skeleton = path / file.name
        self._skeleton, self._spans, self._end = skeleton.open("rb"), iter(file.spans), 0
        skeleton.unlink()  # open, it can be read on
        self._file, self._dtype = RecordedFile(LocalFolder(path), file.name), torch.uint8

    def begin(self) -> None:
        """The elements of the next tensor are next."""
        begin, end, self._dtype = next(self._spans)
        self._go_to(begin)
        self._end = end

    def append(self, part: Tensor) -> None:
        self._file.write(bytes_of(part.to(self._dtype)))

    def close(self) -> WrittenPart:
        if next(self._spans, None) is not None:
            raise ValueError(f"{self._file.name}: tensors are missing behind byte {self._file.position}")
        self._go_to(os.fstat(self._skeleton.fileno()).st_size)
        self._skeleton.close()
        return WrittenPart({}, {self._file.name: self._file.close()})

    def _go_to(self, position: int) -> None:
        """Write what is not elements, up to `position`."""
        if self._file.position != self._end:
            raise ValueError(f"{self._file.name}: elements end at byte {self._file.position}, expected {self._end}")
        self._skeleton.seek(self._end)
        self._file.write(self._skeleton.read(position - self._end))


def copy_tensors(
    source: Source,
    named: Sequence[tuple[str, Parameter]],
    tensor_parallel: int,
    block_bytes: int,
    read_bytes: int,
    sink: Sink,
) -> list[WrittenPart]:
    """Copy tensors, (name in the checkpoint, the parameter it belongs to), one behind the other, in pieces of
    `block_bytes` of which `read_bytes` are read and written at once."""
    memory: dict[torch.dtype, Tensor] = {}
    for name, parameter in named:
        dtype = source.tensors[name].dtype
        for block in blocks(parameter, tensor_parallel, dtype.itemsize, block_bytes):
            for row, rows in block.rows(dtype.itemsize, read_bytes):
                offset, shape = (block.offset[0] + row, *block.offset[1:]), (rows, *block.shape[1:])
                size = math.prod(shape)
                if dtype not in memory or memory[dtype].numel() < size:
                    memory[dtype] = torch.empty(size, dtype=dtype)
                tensor = source.read(name, offset, shape, out=memory[dtype][:size].view(shape))
                sink.write(name, parameter, block, row, tensor)
            moved(math.prod(block.shape) * dtype.itemsize)
    return sink.close()

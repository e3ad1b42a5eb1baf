"""What differs between two checkpoints, whatever their layouts and formats."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from illada_megatron.checkpoint.files.names import WEIGHT, split_name
from illada_megatron.checkpoint.tools.opening import OpenCheckpoint
from illada_megatron.checkpoint.tools.processes import default_processes, pool
from illada_megatron.checkpoint.tools.sources import Source

# Memory that comparing a block takes, in blocks of it: both, their difference and what is made of it, in fp32.
_COPIES_OF_A_BLOCK = 12
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both."""

    name: str
    elements: int
    different: int
    """Elements whose bits differ."""
    largest: float
    """|a - b|; infinite where only one of them is a number."""
    largest_relative: float
    """|a - b| / max(|a|, |b|)."""


@dataclass(frozen=True)
class Comparison:
    """Of two checkpoints; names sorted."""

    only_in_first: list[str]
    only_in_second: list[str]
    of_other_kind: list[str]
    """What is said of tensors whose shapes or dtypes differ; their values are not compared."""
    same: int
    differences: list[Difference]
    """The largest first."""

    @property
    def identical(self) -> bool:
        return not (self.only_in_first or self.only_in_second or self.of_other_kind or self.differences)


def compare(
    first: OpenCheckpoint,
    second: OpenCheckpoint,
    optimizer: bool = True,
    memory_mb: int = 512,
    processes: int | None = None,
) -> Comparison:
    """Compare all tensors bit for bit, streaming. optimizer False: the weights only. memory_mb: of tensors that all
    processes together hold at a time. Raises CheckpointError, OSError."""
    ours, theirs = (
        {name for name in one.source.tensors if optimizer or split_name(name).state == WEIGHT}
        for one in (first, second)
    )
    kinds, compared = [], []
    for name in sorted(ours & theirs):
        a, b = first.source.tensors[name], second.source.tensors[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            kinds.append(f"{name}: {list(a.shape)} {a.dtype} in the first, {list(b.shape)} {b.dtype} in the second")
        else:
            compared.append(name)
    count = processes or default_processes()
    block_bytes = min(_BLOCK_BYTES, memory_mb * 10**6 // (count * _COPIES_OF_A_BLOCK))
    sizes = [2 * first.source.tensors[name].nbytes for name in compared]
    with pool((first.source, second.source, block_bytes), count) as workers:
        found = workers.run("comparing", _compare, compared, sizes)
    differences = [one for one in found if one is not None]
    return Comparison(
        only_in_first=sorted(ours - theirs),
        only_in_second=sorted(theirs - ours),
        of_other_kind=kinds,
        same=len(found) - len(differences),
        differences=sorted(differences, key=lambda one: (-one.largest, one.name)),
    )


def row_blocks(source: Source, name: str, block_bytes: int) -> Iterator[Tensor]:
    """A tensor in rows of at most `block_bytes`, at least one; the memory is used again for each."""
    info = source.tensors[name]
    if not info.shape or info.nbytes == 0:
        yield source.read(name)
        return
    rows = max(1, block_bytes * info.shape[0] // info.nbytes)
    memory = torch.empty((min(rows, info.shape[0]), *info.shape[1:]), dtype=info.dtype)
    zeros = tuple(0 for _ in info.shape[1:])
    for row in range(0, info.shape[0], rows):
        block = memory[: min(rows, info.shape[0] - row)]
        yield source.read(name, (row, *zeros), tuple(block.shape), out=block)


def _compare(shared: tuple[Source, Source, int], name: str) -> Difference | None:
    first, second, block_bytes = shared
    different, largest, relative = 0, 0.0, 0.0
    blocks = zip(row_blocks(first, name, block_bytes), row_blocks(second, name, block_bytes), strict=True)
    for a, b in blocks:
        bits = _BITS[a.itemsize]
        if torch.equal(a.view(bits), b.view(bits)):
            continue
        different += int((a.view(bits) != b.view(bits)).sum())
        distance = (a.float() - b.float()).abs_().nan_to_num_(nan=math.inf, posinf=math.inf)
        distance[(a.view(bits) == b.view(bits))] = 0.0  # also where both are the same NaN or infinity
        largest = max(largest, float(distance.max()))
        distance /= torch.maximum(a.float().abs(), b.float().abs()).nan_to_num_(nan=1.0, posinf=1.0)
        relative = max(relative, float(distance.nan_to_num_(nan=0.0, posinf=math.inf).max()))
    if not different:
        return None
    return Difference(name, math.prod(first.tensors[name].shape), different, largest, relative)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

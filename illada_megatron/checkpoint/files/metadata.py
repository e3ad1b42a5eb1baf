"""torch.distributed.checkpoint's `.metadata`: which tensors a checkpoint holds, and where each piece of them lies.

It is a pickle of torch's own dataclasses. It is read without torch's classes and without running code, written with
them. They are imported only then: importing torch.distributed.checkpoint takes seconds, and tools that read start fast.
"""

import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.inert_pickle import Inert, load_inert
from illada_megatron.checkpoint.files.names import is_file_name
from illada_megatron.checkpoint.files.patience import patiently
from illada_megatron.checkpoint.files.storage import Folder

_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)
_CLASS = re.compile(r"_?[A-Z]\w*")
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool")
}
_NAMES = {
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set")),
    *(("torch", name) for name in _DTYPES),
}
_MOST = 1 << 63
"""Elements and bytes are below it."""

Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and where its blob lies."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    """Of the blob, in bytes."""
    length: int
    """Of the blob, in bytes."""


@dataclass(frozen=True)
class TensorInfo:
    """A whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_metadata(place: Folder, name: str = ".metadata") -> dict[str, TensorInfo]:
    """The tensors by name.

    Raises CheckpointError where the file is damaged, names anything else than torch's classes, or points outside the
    checkpoint; OSError.
    """
    tensors = _read(place, name, _tensors)
    _require_inside(place, name, [piece.file for info in tensors.values() for piece in info.pieces])
    return tensors


def read_object(place: Folder, key: str, name: str = ".metadata") -> bytes | None:
    """The bytes of the object that megatron-core calls `key` (a `ShardedObject` in one piece); None: there is none.

    Raises as `read_metadata`.
    """
    found = _read(place, name, lambda metadata: _object(metadata, f"{key}/shard_0_1"))
    if found is None:
        return None
    file, start, length = found
    _require_inside(place, name, [file])
    size = place.size(file) or 0
    if start < 0 or length < 0 or start + length > size:
        raise CheckpointError(f"{place}/{file}: has {size} bytes, but {key} lies at [{start}, {start + length}) of it")
    content = bytearray(length)
    place.read_into(file, start, memoryview(content))
    return bytes(content)


def pickled_metadata(tensors: Mapping[str, TensorInfo]) -> bytes:
    """What torch and megatron-core read as `.metadata`."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, info in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)) for piece in info.pieces]
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), chunks)
        for index, piece in enumerate(info.pieces):
            storage[MetadataIndex(name, piece.offset, index)] = _StorageInfo(piece.file, piece.start, piece.length)
    return pickle.dumps(Metadata(entries, storage_data=storage))


def _read(place: Folder, name: str, take: Callable[[Any], Taken]) -> Taken:
    content = patiently(lambda: place.read(name))
    try:
        return take(load_inert(content, _is_named))
    except Exception as error:  # pickle raises whatever the bytes lead it to, MemoryError and RecursionError too
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{place}/{name}: {reason:.300}; the file is damaged or not a checkpoint's") from error


def _is_named(module: str, name: str) -> bool:
    return (module, name) in _NAMES or (module in _MODULES and _CLASS.fullmatch(name) is not None)


def _require_inside(place: Folder, name: str, files: Sequence[str]) -> None:
    outside = [file for file in files if not is_file_name(file)]
    if outside:
        raise CheckpointError(f"{place}/{name}: names the file {outside[0]}, expected files of its own folder")


def _object(metadata: Any, key: str) -> tuple[str, int, int] | None:
    for index, where in metadata.storage_data.items():
        if index.fqn == key:
            return _where(where)
    return None


def _tensors(metadata: Any) -> dict[str, TensorInfo]:
    places = {
        (index.fqn, _integers(index.offset)): where
        for index, where in metadata.storage_data.items()
        if vars(index).get("offset") is not None  # None, its class's default: no piece of a tensor
    }
    tensors: dict[str, TensorInfo] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry).__name__ != "TensorStorageMetadata":
            continue
        if not isinstance(name, str):
            raise TypeError(f"a tensor's name is of type {type(name).__name__}, expected str")
        pieces: list[Piece] = []
        for chunk in entry.chunks:
            offset, shape = _integers(chunk.offsets), _integers(chunk.sizes)
            where = places[name, offset]
            pieces.append(Piece(offset, shape, *_where(where)))
        tensors[name] = TensorInfo(_integers(entry.size), _dtype(name, entry.properties.state[0]), pieces)
    return tensors


def _where(where: Any) -> tuple[str, int, int]:
    """(file, first byte, bytes)."""
    if not isinstance(where.relative_path, str):
        raise TypeError(f"a file's name is of type {type(where.relative_path).__name__}, expected str")
    start, length = _integers((where.offset, where.length))
    return where.relative_path, start, length


def _dtype(name: str, found: Any) -> torch.dtype:
    if not (isinstance(found, type) and issubclass(found, Inert) and found.__name__ in _DTYPES):
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        raise TypeError(f"{name} has the dtype {kind}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[found.__name__]


def _integers(values: Any) -> tuple[int, ...]:
    """A shape, an offset, or places in a file."""
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < _MOST for number in numbers):
        raise TypeError("a shape, an offset or a place in a file has something else than numbers from 0 to 2^63")
    return numbers

"""torch.distributed.checkpoint's `.metadata`: which tensors a checkpoint holds, and where each piece of them lies.

It is a pickle of torch's own dataclasses. It is read without torch's classes and without running code, written with
them. They are imported only then: importing torch.distributed.checkpoint takes seconds, and tools that read start fast.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.patience import patiently
from illada_megatron.checkpoint.files.storage import Folder

_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)
_CLASS = re.compile(r"_?[A-Z]\w*")
_NAMES = (
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set")),
    *(("torch", name) for name in ("float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool")),
)


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
        return take(_Unpickler(io.BytesIO(content)).load())
    except Exception as error:  # pickle raises whatever the bytes lead it to
        raise CheckpointError(f"{place}/{name}: {error}; the file is damaged or not a checkpoint's") from error


def _require_inside(place: Folder, name: str, files: Sequence[str]) -> None:
    outside = [file for file in files if "/" in file]
    if outside:
        raise CheckpointError(f"{place}/{name}: names the file {outside[0]}, expected files of its own folder")


def _object(metadata: Any, key: str) -> tuple[str, int, int] | None:
    for index, where in metadata.storage_data.items():
        if index.fqn == key:
            return str(where.relative_path), int(where.offset), int(where.length)
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
        pieces: list[Piece] = []
        for chunk in entry.chunks:
            offset, shape = _integers(chunk.offsets), _integers(chunk.sizes)
            where = places[name, offset]
            pieces.append(Piece(offset, shape, str(where.relative_path), int(where.offset), int(where.length)))
        dtype = entry.properties.state[0]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} has the dtype {dtype}")
        tensors[name] = TensorInfo(_integers(entry.size), dtype, pieces)
    return tensors


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


class _Fields:
    """An object of one of torch's classes: its fields, and nothing that could run."""

    def __init__(self, *_: Any) -> None:
        """An enum is made from its value; none is looked at."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


@lru_cache
def _stand_in(name: str) -> type[_Fields]:
    return type(name, (_Fields,), {})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if module in _MODULES and _CLASS.fullmatch(name):
            return _stand_in(name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

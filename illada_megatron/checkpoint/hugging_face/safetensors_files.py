"""Sharded safetensors in bounded memory: https://huggingface.co/docs/safetensors describes the format.

    model-00001-of-00002.safetensors    length of the header (8 bytes), header (JSON), then tensor after tensor
    model.safetensors.index.json        which file has which tensor; not where there is only one, model.safetensors

The safetensors library writes a file from tensors that are all in memory, and reads by mapping it. Here a header is
made from shapes alone and the bytes follow in blocks of rows; blocks of rows are read from where they lie. The library
still judges every file that is read.
"""

import errno
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.storage import Folder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int
    """Of its bytes in the file."""


class SafetensorsReader:
    """The tensors of a directory, by name. Raises CheckpointError where a file is damaged or of another kind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        names, index = _files(directory)
        for name in names:
            for tensor, stored in _header(directory / name).items():
                if tensor in self.tensors:
                    raise CheckpointError(f"{directory}: {tensor} is in {self.tensors[tensor].file} and in {name}")
                self.tensors[tensor] = stored
        for tensor, name in index.items():
            if tensor not in self.tensors or self.tensors[tensor].file != name:
                raise CheckpointError(f"{directory / INDEX}: says {tensor} is in {name}, which does not have it")

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows [first, first + count) of a tensor. Raises OSError."""
        stored = self.tensors[name]
        result = torch.empty((count, *stored.shape[1:]), dtype=stored.dtype)
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        LocalFolder(self.directory).read_into(stored.file, stored.start + first * row_bytes, bytes_of(result))
        return result


@dataclass(frozen=True)
class NewTensor:
    """What is going to be written."""

    name: str
    shape: tuple[int, ...]


def write_safetensors(
    place: Folder, tensors: Sequence[NewTensor], dtype: torch.dtype, max_shard_bytes: int, blocks: Iterable[Tensor]
) -> list[str]:
    """Write all tensors in their order, durable when this returns, in files of at most `max_shard_bytes` (one tensor
    may be larger), and the index where they are several. Returns the names of the files.

    blocks: the elements of all tensors one behind the other, in blocks of any size that do not cross tensors. Raises
    OSError; ValueError where blocks are not what the shapes say.
    """
    shards = _shards(tensors, dtype, max_shard_bytes)
    stream, files, index = iter(blocks), [], {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(place, file, shard, dtype, stream)
        files.append(file)
        index.update({tensor.name: file for tensor in shard})
    if next(stream, None) is not None:
        raise ValueError("blocks are left after the last tensor")
    if len(shards) > 1:
        total = sum(math.prod(tensor.shape) for tensor in tensors)
        metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
        text = json.dumps({"metadata": metadata, "weight_map": index}, indent=2)
        write_file(place, INDEX, text.encode() + b"\n")
        files.append(INDEX)
    return files


def write_file(place: Folder, name: str, content: bytes) -> None:
    """A small file, durable when this returns."""
    sink = place.create(name)
    sink.write(content)
    sink.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_shard(
    place: Folder, name: str, shard: Sequence[NewTensor], dtype: torch.dtype, blocks: Iterator[Tensor]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes
    sink = place.create(name)
    try:
        sink.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            left = math.prod(tensor.shape)
            while left:
                block = next(blocks).contiguous()
                left -= block.numel()
                if block.dtype != dtype or left < 0:
                    raise ValueError(f"{tensor.name}: a block of {block.numel()} {block.dtype}, {left} left of {dtype}")
                sink.write(bytes_of(block))
        sink.close()
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise CheckpointError(
            f"{place}/{name}: has {8 + len(text) + end:,} bytes, more than the file system or this shell's `ulimit -f` "
            "allows a file: raise the limit, or give a smaller --max-shard-size (one tensor is never cut)"
        ) from error


def _shards(tensors: Sequence[NewTensor], dtype: torch.dtype, max_bytes: int) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """(files to read, what the index says)."""
    if (directory / SINGLE).is_file():
        return [SINGLE], {}
    index = directory / INDEX
    if not index.is_file():
        found = "; pytorch_model.bin is read with pickle: convert it to safetensors first"
        raise CheckpointError(
            f"{directory}: has neither {SINGLE} nor {INDEX}" + (found if any(directory.glob("*.bin")) else "")
        )
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted({*weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: expected JSON with a weight_map of tensors to files: {error!r}") from error
    for name in names:
        # a name and nothing else: an index must not lead out of its directory
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names the file {name!r}, expected a name of a .safetensors beside it")
        if not (directory / name).is_file():
            raise CheckpointError(f"{index}: names the file {name!r}, which is missing: fetch the whole checkpoint")
    return names, weight_map


def _header(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:  # first: the library says of a file that it may not read that there is none
        try:
            with safe_open(path, framework="pt"):  # checks the header against the file: sizes, overlaps, holes
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
        except OSError as error:  # without a name
            raise CheckpointError(f"{path}: cannot be mapped into memory: {error}") from error
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}: quantised weights "
                "have to be made floats again first"
            )
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(tuple(entry["shape"]), _DTYPES[entry["dtype"]], path.name, start)
    return tensors

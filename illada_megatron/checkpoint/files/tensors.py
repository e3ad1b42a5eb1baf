"""Tensors in torch.distributed.checkpoint's files, in boxes of any shape, written and read box by box.

    .metadata          a pickle of torch's own dataclasses: shape and dtype of every tensor, where each piece lies
    __{rank}_*.distcp  pieces one behind the other, each of them what torch.save writes for it

torch and megatron-core read what is written here, and the other way round. Their own writers want every rank's whole
state in one shape of grid and plan each save with all ranks; here a rank writes the ranges it owns, whatever their
shape, and says afterwards what it wrote. Bytes go from the tensor's memory to the file and back without a copy.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.integrity import FileRecord, RecordedFile
from illada_megatron.checkpoint.files.metadata import Piece, TensorInfo, pickled_metadata, read_metadata
from illada_megatron.checkpoint.files.pieces import defect_of
from illada_megatron.checkpoint.files.storage import Folder, folder

PIECE_BYTES = 32 << 20
"""Largest piece that is written (a single row may be larger): what a reader has to hold at a time."""
_METADATA = ".metadata"
# Of the zip archive around a piece's elements: what lies before and behind them is far below the first.
_HEAD_BYTES = 4096
_RECORD, _ZIP_HEADER, _ZIP_HEADER_BYTES = b"/data/0", b"PK\x03\x04", 30
# What megatron-core looks for beside them.
_BACKEND = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}'


@dataclass(frozen=True)
class WrittenPart:
    """What one writer has written."""

    tensors: dict[str, TensorInfo]
    """With its own pieces only."""
    files: dict[str, FileRecord]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        tensors = {
            name: {
                "shape": info.shape,
                "dtype": str(info.dtype).removeprefix("torch."),
                "pieces": [(one.offset, one.shape, one.file, one.start, one.length) for one in info.pieces],
            }
            for name, info in self.tensors.items()
        }
        return {"tensors": tensors, "files": self.files}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "WrittenPart":
        """The other way round."""
        tensors = {
            name: TensorInfo(
                tuple(info["shape"]),
                getattr(torch, info["dtype"]),
                [Piece(tuple(offset), tuple(shape), *rest) for offset, shape, *rest in info["pieces"]],
            )
            for name, info in plain["tensors"].items()
        }
        return cls(tensors, plain["files"])


class TensorWriter:
    """Writes boxes of tensors into one file of a checkpoint, as they come; `rank` tells the writers of a checkpoint
    apart, `attempt` those who may come to write the same one again. Raises OSError."""

    def __init__(self, place: Folder, rank: int = 0, piece_bytes: int = PIECE_BYTES, attempt: str = "0") -> None:
        self._file = RecordedFile(place, f"__{rank}_{attempt}.distcp")
        self._piece_bytes = piece_bytes
        self._tensors: dict[str, TensorInfo] = {}
        self._missing = 0  # bytes of the piece that was begun
        self._tail = b""

    def write(
        self, name: str, tensor: Tensor, offset: Sequence[int] | None = None, whole_shape: Sequence[int] | None = None
    ) -> None:
        """Write the box that begins at `offset` of tensor `name` of shape `whole_shape` (None: it is the whole)."""
        tensor = tensor.detach().cpu().contiguous()
        first = tuple(offset or (0,) * tensor.dim())
        info = self._tensors.setdefault(name, TensorInfo(tuple(whole_shape or tensor.shape), tensor.dtype, []))
        if tensor.numel() == 0:
            return
        for row, block in row_pieces(tensor, self._piece_bytes):
            at = (first[0] + row, *first[1:]) if first else ()
            self.begin(name, block.dtype, block.shape, at, info.shape)
            self.append(block)

    def begin(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], offset: Sequence[int], whole_shape: Sequence[int]
    ) -> None:
        """Begin a piece of tensor `name`, the box of `shape`, not empty, at `offset`; `append` has to give its elements
        before another begins. Raises ValueError where the last piece lacks some; OSError."""
        if self._missing:
            raise ValueError(f"{self._file.name}: {self._missing} bytes of the last piece are missing before a new one")
        info = self._tensors.setdefault(name, TensorInfo(tuple(whole_shape), dtype, []))
        head, self._tail = _envelope(dtype, tuple(shape))
        self._missing = math.prod(shape) * dtype.itemsize
        length = len(head) + self._missing + len(self._tail)
        info.pieces.append(Piece(tuple(offset), tuple(shape), self._file.name, self._file.position, length))
        self._file.write(head)

    def append(self, tensor: Tensor) -> None:
        """The next elements of the piece: a contiguous tensor on the CPU, in the piece's dtype. Raises ValueError where
        they are more than the piece has; OSError."""
        content = bytes_of(tensor)
        self._missing -= len(content)
        if self._missing < 0:
            raise ValueError(f"{self._file.name}: {-self._missing} bytes more than the piece has")
        self._file.write(content)
        if not self._missing:
            self._file.write(self._tail)

    def close(self) -> WrittenPart:
        """Make the file durable and say what is in it."""
        if self._missing:
            raise ValueError(f"{self._file.name}: {self._missing} bytes of the last piece are missing")
        return WrittenPart(self._tensors, {self._file.name: self._file.close()})

    def abandon(self) -> None:
        """Give the file up."""
        self._file.abandon()


def write_metadata(place: Folder, parts: Sequence[WrittenPart]) -> dict[str, FileRecord]:
    """Write `.metadata`, and what megatron-core looks for, when all writers are closed; one process calls it. Returns
    the records of all files of the checkpoint."""
    infos: dict[str, TensorInfo] = {}
    for part in parts:
        for name, info in part.tensors.items():
            known = infos.setdefault(name, TensorInfo(info.shape, info.dtype, []))
            if (known.shape, known.dtype) != (info.shape, info.dtype):
                raise CheckpointError(
                    f"{place}: {name} was written as {info.shape} {info.dtype} and as {known.shape} {known.dtype}"
                )
            known.pieces.extend(info.pieces)
    for name, info in infos.items():
        if (defect := defect_of(info)) is not None:
            raise CheckpointError(f"{place}: {name} was not written as it is: {defect}")
    empty = io.BytesIO()
    torch.save({}, empty)
    files = {name: record for part in parts for name, record in part.files.items()}
    for name, content in (
        (_METADATA, pickled_metadata(infos)),
        ("metadata.json", _BACKEND),
        ("common.pt", empty.getvalue()),
    ):
        file = RecordedFile(place, name)
        file.write(content)
        files[name] = file.close()
    return dict(sorted(files.items()))


class TensorReader:
    """The tensors of a checkpoint by name; boxes are read straight from where they lie. Threads may share one.

    Raises CheckpointError where `.metadata` is damaged or hostile.
    """

    def __init__(self, path: Any) -> None:
        self.place = folder(path)
        self.tensors = read_metadata(self.place, _METADATA)
        self._checked: set[str] = set()
        self._sizes: dict[str, int] = {}

    def read(
        self,
        name: str,
        offset: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The box of `shape` at `offset` (None: the whole tensor), into `out` where it is given, in out's dtype.

        out: contiguous, on the CPU, with as many elements as the box. Raises CheckpointError where the checkpoint does
        not hold all of the box.
        """
        info = self._whole(name)
        offset = tuple(offset if offset is not None else (0,) * len(info.shape))
        shape = tuple(shape if shape is not None else info.shape)
        if any(first + length > whole for first, length, whole in zip(offset, shape, info.shape, strict=True)):
            raise CheckpointError(f"{self.place}: {name} has shape {info.shape}, asked for were {shape} at {offset}")
        result = torch.empty(shape, dtype=info.dtype) if out is None else out.view(shape)
        for piece in info.pieces:
            if shape and not offset[0] - piece.shape[0] < piece.offset[0] < offset[0] + shape[0]:
                continue  # most pieces of a large tensor: they are many
            box = _overlap(offset, shape, piece)
            if box is not None:
                low, size = box
                within = tuple(slice(a - b, a - b + n) for a, b, n in zip(low, offset, size, strict=True))
                self._copy(name, info.dtype, piece, low, size, result[within])
        return result

    def _whole(self, name: str) -> TensorInfo:
        """What is known of a tensor. Each of its elements lies in one piece, and in the file of that: one that is
        counted twice would leave another as it was in memory."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.place}: holds no tensor {name}")
        if name not in self._checked:
            if (defect := defect_of(info) or self._outside(info)) is not None:
                raise CheckpointError(f"{self.place}/{_METADATA}: {name}: {defect}; the checkpoint is damaged")
            self._checked.add(name)
        return info

    def _outside(self, info: TensorInfo) -> str | None:
        """Which piece does not lie in its file; None: all do."""
        for piece in info.pieces:
            if piece.file not in self._sizes:
                self._sizes[piece.file] = self.place.size(piece.file) or 0
            nbytes, size = math.prod(piece.shape) * info.dtype.itemsize, self._sizes[piece.file]
            if nbytes > piece.length or piece.start + piece.length > size:
                return f"{nbytes} bytes lie in {piece.length} from {piece.start} on of {piece.file}, which has {size}"
        return None

    def _copy(
        self,
        name: str,
        dtype: torch.dtype,
        piece: Piece,
        low: tuple[int, ...],
        size: tuple[int, ...],
        target: Tensor,
    ) -> None:
        """The part of `piece` of shape `size` at `low` of the whole tensor into `target`."""
        data = self._data_start(name, dtype, piece)
        piece_shape, piece_offset = piece.shape, piece.offset
        if not size:  # a scalar: as a vector of one
            low, size, piece_shape, piece_offset, target = (0,), (1,), (1,), (0,), target.view(1)
        first = 0  # element of the piece
        while len(size) > 1 and size[0] == 1:  # a single row: only its own elements are read, not the whole of it
            first += (low[0] - piece_offset[0]) * math.prod(piece_shape[1:])
            low, size, piece_shape, piece_offset = low[1:], size[1:], piece_shape[1:], piece_offset[1:]
            target = target[0]
        first += (low[0] - piece_offset[0]) * math.prod(piece_shape[1:])
        rows = (size[0], *piece_shape[1:])
        begin = data + first * dtype.itemsize
        if rows == size and target.is_contiguous() and target.dtype == dtype:
            self.place.read_into(piece.file, begin, bytes_of(target))
            return
        block = torch.empty(rows, dtype=dtype)
        self.place.read_into(piece.file, begin, bytes_of(block))
        within = tuple(slice(a - b, a - b + n) for a, b, n in zip(low[1:], piece_offset[1:], size[1:], strict=True))
        target.copy_(block[(slice(None), *within)])

    def _data_start(self, name: str, dtype: torch.dtype, piece: Piece) -> int:
        """Where the piece's elements begin in its file: behind the header of the record `data/0` of torch.save's zip
        archive. It is looked for in one read, which object storage answers in one request."""
        head = bytearray(min(_HEAD_BYTES, piece.length))
        self.place.read_into(piece.file, piece.start, memoryview(head))
        name_end = head.find(_RECORD) + len(_RECORD)
        header = head.rfind(_ZIP_HEADER, 0, name_end)
        nbytes = math.prod(piece.shape) * dtype.itemsize
        if name_end >= len(_RECORD) and header >= 0 and header + _ZIP_HEADER_BYTES <= len(head):
            compression = int.from_bytes(head[header + 8 : header + 10], "little")
            name_bytes, extra_bytes = (int.from_bytes(head[header + at : header + at + 2], "little") for at in (26, 28))
            start = header + _ZIP_HEADER_BYTES + name_bytes + extra_bytes
            behind = piece.length - start - nbytes
            if header + _ZIP_HEADER_BYTES + name_bytes == name_end and compression == 0 and 0 < behind < _HEAD_BYTES:
                return piece.start + start
        raise CheckpointError(
            f"{self.place}/{piece.file}: damaged: at byte {piece.start} lies no tensor of torch with {nbytes} bytes, "
            f"which the piece of {name} at {piece.offset} has"
        )


def _overlap(
    offset: tuple[int, ...], shape: tuple[int, ...], piece: Piece
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(offset, shape) in the whole tensor of what a box shares with a piece; None: nothing."""
    low = tuple(map(max, offset, piece.offset))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(offset, shape, piece.offset, piece.shape, strict=True))
    size = tuple(b - a for a, b in zip(low, high, strict=True))
    return (low, size) if all(length > 0 for length in size) else None


def row_pieces(tensor: Tensor, piece_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of at most `piece_bytes`, at least one row."""
    if tensor.dim() == 0:
        yield 0, tensor
        return
    rows = max(1, piece_bytes // max(1, tensor[0].numel() * tensor.itemsize))
    for row in range(0, tensor.shape[0], rows):
        yield row, tensor[row : row + rows]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _envelope(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and behind a tensor's elements. Its checksum in there is of other elements: torch
    does not look at it, and the files have their own."""
    archive = io.BytesIO()
    tensor = torch.empty(shape, dtype=dtype)
    with torch.serialization.skip_data():
        torch.save(tensor, archive)
    content = archive.getbuffer()
    archive.seek(0)
    reader: Any = torch._C.PyTorchFileReader(archive)
    start = reader.get_record_offset("data/0") if tensor.numel() else len(content)
    return bytes(content[:start]), bytes(content[start + tensor.nbytes :])

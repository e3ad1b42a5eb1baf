"""Files of torch.save read without their tensors' data and without running anything that they name."""

import argparse
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError


class Unread:
    """Stands where a file names a class or function that is not needed (Megatron's enums, random states of numpy):
    takes whatever it is made with, and does nothing."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_plain(file: Path, content: bytes | None = None) -> Any:
    """What torch.save wrote to `file`, or as `content` into it: plain values, argparse.Namespace, and tensors on the
    meta device, whose data lie at `data_offset`. Everything else is an `Unread`.

    Raises CheckpointError where the file is damaged or is not torch's, OSError.
    """
    source: Any = file if content is None else io.BytesIO(content)
    try:
        _require_uncompressed(source)
        with _only_plain_values():
            _rewind(source)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
            _rewind(source)
            unread: list[Any] = [(Unread, name) for name in names if name != "argparse.Namespace"]
            torch.serialization.add_safe_globals([argparse.Namespace, *unread])
            return torch.load(source, map_location="meta", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle raises whatever the bytes lead it to, MemoryError and RecursionError too
        reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
        raise CheckpointError(f"{file}: not a file of torch.save that can be read safely: {reason:.300}") from error


def _require_uncompressed(source: Any) -> None:
    """torch.save does not compress. What is compressed could be a thousand times as large in memory."""
    with zipfile.ZipFile(source) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{packed[0]} in it is compressed, which torch.save never does: save it with torch again")


def _rewind(source: Any) -> None:
    if isinstance(source, io.BytesIO):
        source.seek(0)


@contextmanager
def _only_plain_values() -> Iterator[None]:
    """Within the block torch's unpickler takes no more than that and what is added there; megatron-core, once imported,
    has added more."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def data_offset(tensor: Tensor, file: Path, name: str) -> int:
    """Where in `file` the elements of a tensor of `load_plain` begin, in bytes, one behind the other.

    Raises CheckpointError where they do not lie like that.
    """
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None or not tensor.is_contiguous():
        raise CheckpointError(
            f"{file}: {name} does not lie in one piece (shape {tuple(tensor.shape)}, strides {tensor.stride()}); "
            "save it with torch.save of contiguous tensors, torch 1.6 or later"
        )
    return begin + tensor.storage_offset() * tensor.itemsize

"""Files of torch.save read without their tensors' data and without running anything that they name."""

import argparse
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illada_megatron.checkpoint.errors import CheckpointError


class Unread:
    """Stands where a file names a class or function that is not needed (Megatron's enums, random states of numpy):
    takes whatever it is made with, and does nothing."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_plain(file: Path) -> Any:
    """What torch.save wrote to `file`: plain values, argparse.Namespace, and tensors on the meta device, whose data lie
    at `data_offset`. Everything else is an `Unread`.

    Raises CheckpointError where the file is damaged or is not torch's, OSError.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        allowed: list[Any] = [(Unread, name) for name in names if name != "argparse.Namespace"]
        with ExitStack() as stack:
            stack.enter_context(torch.serialization.safe_globals([argparse.Namespace, *allowed]))
            return torch.load(file, map_location="meta", weights_only=True)
    except OSError:
        raise
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file}: not a file of torch.save that can be read safely: {reason}") from error


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

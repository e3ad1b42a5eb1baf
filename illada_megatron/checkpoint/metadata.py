"""torch's `.metadata`, a pickle, read without letting it run code: nothing but the classes that it consists of."""

import io
import pickle
import sys
from typing import Any

from illada_megatron.checkpoint.errors import CheckpointError
from illada_megatron.checkpoint.storage import Folder

_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)
_NAMES = (
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set")),
    *(("torch", name) for name in ("float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool")),
)


def read_metadata(place: Folder, name: str = ".metadata") -> Any:
    """torch's Metadata, with its tensors only: other entries would have to be read with pickle, and nothing here does.

    Raises CheckpointError where the file is damaged, names anything else, or points outside the checkpoint; OSError.
    """
    content = place.read(name)
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
        kept = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if type(entry).__name__ == "TensorStorageMetadata"
        }
        metadata.state_dict_metadata = kept
        outside = [one.relative_path for one in metadata.storage_data.values() if "/" in one.relative_path]
    except Exception as error:  # pickle raises whatever the bytes lead it to
        raise CheckpointError(f"{place}/{name}: {error}; the file is damaged or not a checkpoint's") from error
    if outside:
        raise CheckpointError(f"{place}/{name}: names the file {outside[0]}, expected files of its own folder")
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        # The modules' own dataclasses and enums; not what they import, nor a dotted walk through it.
        found = getattr(sys.modules.get(module), name, None) if module in _MODULES else None
        if isinstance(found, type) and found.__module__ == module:
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

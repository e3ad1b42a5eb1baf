"""Checkpoints as directories: which are complete, which is the newest, and the pointer to it. No tensors here.

    save_dir/
      latest                    name of the newest complete checkpoint; replaced atomically, after everything else
      step_00000100/            megatron-core's torch_dist files, and
        checkpoint.json         written last: step, configuration, and the size of every file

A directory without a checkpoint.json that matches its files was interrupted, and is never loaded.
"""

import json
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "checkpoint.json"
_POINTER = "latest"
_VERSION = 1
# What torch.distributed.checkpoint's and megatron-core's metadata consist of.
_METADATA_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)
_METADATA_NAMES = (
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set")),
    *(("torch", name) for name in ("float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool")),
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used or written; the message names the path and what to do."""


class _InterruptedError(CheckpointError):
    """The directory never became a checkpoint."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    path: Path
    step: int
    config: dict[str, Any]
    """The run's configuration when it was saved."""


def step_directory(save_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return save_dir / f"step_{step:08d}"


def finish(path: Path, step: int, config: dict[str, Any]) -> None:
    """Make the files of `path` durable, record them, move the pointer. One rank calls it, when all have written."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != RECORD)
    for file in files:
        _sync(file)
    record = {
        "version": _VERSION,
        "step": step,
        "config": config,
        "files": {str(file.relative_to(path)): file.stat().st_size for file in files},
    }
    _write_atomically(path / RECORD, json.dumps(record, indent=1))
    _write_atomically(path.parent / _POINTER, path.name + "\n")


def newest_complete(load_dir: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """The newest complete checkpoint below `load_dir` (or `load_dir` itself, if it is one), and why newer ones were
    refused. None where there is none, or only interrupted ones: nothing was ever complete, so nothing is lost.

    Raises CheckpointError where the directory does not exist, or where checkpoints that were complete are damaged
    and no good one is left.
    """
    if not load_dir.is_dir():
        raise CheckpointError(f"{load_dir}: no such directory; give checkpoint.load_dir of an earlier run")
    candidates = [load_dir] if load_dir.name.startswith("step_") else _newest_first(load_dir)
    refused: list[str] = []
    damaged = False
    for path in candidates:
        try:
            return _read(path), refused
        except _InterruptedError as error:
            refused.append(str(error))
        except CheckpointError as error:
            damaged = True
            refused.append(str(error))
    if damaged:
        raise CheckpointError(
            f"{load_dir}: no intact checkpoint; repair one, or give an empty checkpoint.save_dir to start anew:\n  "
            + "\n  ".join(refused)
        )
    return None, refused


def check_metadata(path: Path) -> None:
    """Refuse a `.metadata` that is more than metadata, or that says of anything but tensors where it lies: torch reads
    this file and all other values with pickle, which can run code."""
    try:
        with (path / ".metadata").open("rb") as file:
            entries = _MetadataUnpickler(file).load().state_dict_metadata
        objects = [name for name, entry in entries.items() if type(entry).__name__ != "TensorStorageMetadata"]
    except OSError:
        raise
    except Exception as error:  # pickle raises whatever the bytes lead it to
        raise CheckpointError(f"{path / '.metadata'}: {error}; the file is damaged or not a checkpoint's") from error
    if objects:
        raise CheckpointError(
            f"{path / '.metadata'}: {objects[0]} is no tensor; this is not a checkpoint of this program"
        )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_NAMES:
            return super().find_class(module, name)
        # The modules' own dataclasses and enums; not what they import, nor a dotted walk through it.
        found = getattr(sys.modules.get(module), name, None) if module in _METADATA_MODULES else None
        if isinstance(found, type) and found.__module__ == module:
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _newest_first(load_dir: Path) -> list[Path]:
    steps = [path for path in load_dir.glob("step_*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(steps, key=lambda path: int(path.name[5:]), reverse=True)


def _read(path: Path) -> CheckpointInfo:
    try:
        record = json.loads((path / RECORD).read_text())
    except FileNotFoundError:
        raise _InterruptedError(f"{path}: interrupted while it was written ({RECORD} is missing)") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path / RECORD}: not JSON: {error}") from error
    if record.get("version") != _VERSION:
        raise CheckpointError(f"{path / RECORD}: version {record.get('version')}, this program reads {_VERSION}")
    for name, size in record["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{file}: {state}, expected {size} bytes")
    return CheckpointInfo(path, record["step"], record["config"])


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

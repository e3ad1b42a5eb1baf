"""Checkpoints as directories: which are complete, which is the newest, and the pointer to it. No tensors here.

    save_dir/
      latest                    name of the newest complete checkpoint; replaced atomically, after everything else
      step_00000100/            megatron-core's torch_dist files, and
        checkpoint.json         written last: step, configuration, size and checksum of every file

A directory without a checkpoint.json was interrupted, one whose files differ from it is damaged; neither is loaded.
"""

import json
import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from illada_megatron.checkpoint.integrity import RECORD, FileRecord, damage, sync
from illada_megatron.checkpoint.together import gathered

_POINTER = "latest"
_PREFIX = "step_"
_VERSION = 2
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


@dataclass(frozen=True)
class _Refusal:
    """Why a directory is not loaded."""

    reason: str
    interrupted: bool
    """It never became a checkpoint; else it was one, and is damaged."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    path: Path
    step: int
    config: dict[str, Any]
    """The run's configuration when it was saved."""


def step_directory(save_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return save_dir / f"{_PREFIX}{step:08d}"


def step_of(path: Path) -> int:
    """Of a `step_directory`."""
    return int(path.name.removeprefix(_PREFIX))


def finish(path: Path, step: int, config: dict[str, Any], files: Mapping[str, FileRecord]) -> None:
    """Record the durable files of `path` (`integrity.seal`) and move the pointer. One rank calls it."""
    record: dict[str, Any] = {"version": _VERSION, "step": step, "config": config, "files": files}
    record["checksum"] = _own_checksum(record)
    _write_atomically(path / RECORD, json.dumps(record, indent=1))
    _write_atomically(path.parent / _POINTER, path.name + "\n")


def newest_complete(load_dir: Path, checksums: bool = True) -> tuple[CheckpointInfo | None, list[str]]:
    """The newest complete and intact checkpoint below `load_dir` (or `load_dir` itself, if it is one), and why newer
    ones were refused. None where there is none, or only interrupted ones: nothing was ever complete, nothing is lost.

    Every rank of a run calls it: they share the reading (checksums=False: only sizes are compared), and agree.

    Raises CheckpointError where the directory does not exist, or where checkpoints that were complete are damaged
    and no good one is left.
    """
    if not all(gathered(load_dir.is_dir())):
        raise CheckpointError(f"{load_dir}: no such directory; give checkpoint.load_dir of an earlier run")
    candidates = [load_dir] if load_dir.name.startswith(_PREFIX) else checkpoints_newest_first(load_dir)
    refused: list[str] = []
    damaged = False
    for path in gathered(candidates)[0]:
        found = _read(path, checksums)
        refusal = next((other for other in gathered(found) if isinstance(other, _Refusal)), None)
        if refusal is None:
            assert isinstance(found, CheckpointInfo)
            return found, refused
        refused.append(refusal.reason)
        damaged |= not refusal.interrupted
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


def checkpoints_newest_first(save_dir: Path) -> list[Path]:
    """Directories of steps below `save_dir`, complete or not."""
    steps = (path for path in save_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())
    return sorted((path for path in steps if path.is_dir()), key=step_of, reverse=True)


def _read(path: Path, checksums: bool) -> CheckpointInfo | _Refusal:
    file = path / RECORD
    try:
        record = json.loads(file.read_text())
        if record.get("version") != _VERSION:
            return _Refusal(f"{file}: version {record.get('version')}, this program reads {_VERSION}", False)
        if record.pop("checksum") != _own_checksum(record):
            return _Refusal(f"{file}: its bytes have changed: they do not have the checksum that it names", False)
        if (found := damage(path, record["files"], checksums)) is not None:
            return _Refusal(found, False)
        return CheckpointInfo(path, record["step"], record["config"])
    except FileNotFoundError:
        return _Refusal(f"{path}: interrupted while it was written ({RECORD} is missing)", True)
    except json.JSONDecodeError as error:
        return _Refusal(f"{file}: not JSON: {error}", False)
    except UnicodeDecodeError as error:
        return _Refusal(f"{file}: not text: {error}", False)
    except (AttributeError, KeyError, TypeError) as error:
        return _Refusal(f"{file}: not a checkpoint's record: {error!r}", False)
    except OSError as error:
        return _Refusal(f"{path}: cannot be read: {error}", False)


def _own_checksum(record: Mapping[str, Any]) -> str:
    """Of everything in a record but this: a configuration with a changed bit would train something else."""
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)

"""Checkpoints as folders: which are complete, which is the newest, and the pointer to it. No tensors here.

    save_dir/
      latest                    name of the newest complete checkpoint; replaced atomically, after everything else
      step_00000100/            the tensors (`tensors.py`), and
        checkpoint.json         written last: step, configuration, progress, fingerprints, versions, and size and
                                checksum of every file

A folder without a checkpoint.json was interrupted, one whose files differ from it is damaged; neither is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from os import PathLike
from typing import Any

import xxhash

from illada_megatron.checkpoint.files.agreement import gathered
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.integrity import FileRecord, damage
from illada_megatron.checkpoint.files.storage import Folder, folder
from illada_megatron.checkpoint.files.stored_record import check_record
from illada_megatron.config import CheckpointConfig

RECORD = "checkpoint.json"
_POINTER = "latest"
_PREFIX = "step_"
_VERSION = 3
_PACKAGES = ("illada-megatron", "torch", "megatron-core", "numpy")


@dataclass(frozen=True)
class _Refusal:
    """Why a folder is not loaded."""

    reason: str
    interrupted: bool
    """It never became a checkpoint; else it was one, and is damaged."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    path: Folder
    step: int
    config: dict[str, Any]
    """The run's configuration when it was saved."""
    progress: dict[str, Any] | None
    """Where the run was: what is not tensors. None: weights that no run of this program has trained yet."""
    fingerprints: dict[str, Any] = field(default_factory=dict)
    """What the run read: its tokenizer and its data."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that wrote it."""
    files: dict[str, FileRecord] = field(default_factory=dict)


def step_directory(save_dir: Folder, step: int) -> Folder:
    """Where the checkpoint of `step` lies."""
    return save_dir / f"{_PREFIX}{step:08d}"


def check_name(save_dir: Folder) -> None:
    """Raises CheckpointError where a directory that checkpoints come into is named like one of them: whoever names it
    to load would be told that it is incomplete."""
    if save_dir.name.startswith(_PREFIX):
        raise CheckpointError(
            f"{save_dir}: is named like one checkpoint ({_PREFIX}...), but is to hold a directory for each: "
            "take another name"
        )


def step_of(name: str) -> int:
    """Of a `step_directory`'s name."""
    return int(name.removeprefix(_PREFIX))


def finish(
    path: Folder,
    step: int,
    config: dict[str, Any],
    progress: dict[str, Any] | None,
    files: Mapping[str, FileRecord],
    fingerprints: Mapping[str, Any] | None = None,
) -> None:
    """Record the durable files of `path`, which makes it a checkpoint. One rank calls it; raises OSError."""
    record: dict[str, Any] = {
        "version": _VERSION,
        "step": step,
        "config": config,
        "progress": progress,
        "fingerprints": dict(fingerprints or {}),
        "versions": {name: version(name) for name in _PACKAGES},
        "files": dict(files),
    }
    record["checksum"] = _own_checksum(record)
    path.replace(RECORD, json.dumps(record, indent=1).encode())


def move_pointer(path: Folder) -> None:
    """Let `latest` name the finished checkpoint `path`. Raises OSError."""
    path.parent.replace(_POINTER, f"{path.name}\n".encode())


def checkpoint_to_continue(settings: CheckpointConfig) -> tuple[CheckpointInfo | None, list[str]]:
    """The checkpoint that a run continues from (save_dir's if it has one, else load_dir's, which has to have one), and
    why others were refused. Every rank calls it; raises CheckpointError as `newest_complete` does."""
    save_dir, load_dir = settings.save_dir, settings.load_dir
    refused: list[str] = []
    if save_dir and gathered(folder(save_dir).exists())[0]:
        info, refused = newest_complete(save_dir, settings.verify)
        if info is not None:
            return info, refused
    if load_dir is None:
        return None, refused
    info, more = newest_complete(load_dir, settings.verify)
    if info is None:
        raise CheckpointError(f"{load_dir}: holds no checkpoint; leave checkpoint.load_dir out to start from step 0")
    return info, refused + more


def newest_complete(
    load_dir: str | PathLike[str] | Folder, checksums: bool = True
) -> tuple[CheckpointInfo | None, list[str]]:
    """The newest complete and intact checkpoint below `load_dir` (or `load_dir` itself, if it is one), and why newer
    ones were refused. None where there is none, or only interrupted ones: nothing was ever complete, nothing is lost.

    Every rank of a run calls it: they share the reading (checksums=False: only sizes are compared), and agree.

    Raises CheckpointError where the directory does not exist, or where checkpoints that were complete are damaged
    and no good one is left.
    """
    place = folder(load_dir)
    if not all(gathered(place.exists())):
        raise CheckpointError(f"{place}: no such directory; give checkpoint.load_dir of an earlier run")
    candidates = [place] if place.name.startswith(_PREFIX) else checkpoints_newest_first(place)
    refused: list[str] = []
    damaged = False
    for name in gathered([path.name for path in candidates])[0]:
        path = place if place.name.startswith(_PREFIX) else place / name
        found = read_record(path, checksums)
        refusal = next((other for other in gathered(found) if isinstance(other, _Refusal)), None)
        if refusal is None:
            assert isinstance(found, CheckpointInfo)
            return found, refused
        refused.append(refusal.reason)
        damaged |= not refusal.interrupted
    if damaged:
        raise CheckpointError(
            f"{place}: no intact checkpoint; repair one, or give an empty checkpoint.save_dir to start anew:\n  "
            + "\n  ".join(refused)
        )
    return None, refused


def checkpoints_newest_first(save_dir: Folder) -> list[Folder]:
    """Folders of steps below `save_dir`, complete or not."""
    names = (name for name in save_dir.folders() if name.startswith(_PREFIX))
    steps = [name for name in names if name.removeprefix(_PREFIX).isdecimal()]
    return [save_dir / name for name in sorted(steps, key=step_of, reverse=True)]


def read_record(path: Folder, checksums: bool) -> CheckpointInfo | _Refusal:
    """What the record of `path` says, if the files are as it says."""
    file = f"{path}/{RECORD}"
    try:
        record = json.loads(path.read(RECORD))
        if record.get("version") != _VERSION:
            return _Refusal(f"{file}: version {record.get('version')}, this program reads {_VERSION}", False)
        if record.pop("checksum") != _own_checksum(record):
            return _Refusal(f"{file}: its bytes have changed: they do not have the checksum that it names", False)
        del record["version"]
        check_record(record)
        if (found := damage(path, record["files"], checksums)) is not None:
            return _Refusal(found, False)
        return CheckpointInfo(path=path, **record)
    except FileNotFoundError:
        return _Refusal(f"{path}: interrupted while it was written ({RECORD} is missing)", True)
    except json.JSONDecodeError as error:
        return _Refusal(f"{file}: not JSON: {error}", False)
    except UnicodeDecodeError as error:
        return _Refusal(f"{file}: not text: {error}", False)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        return _Refusal(f"{file}: not a checkpoint's record: {error!r:.500}", False)
    except OSError as error:
        return _Refusal(f"{path}: cannot be read: {error}", False)


def _own_checksum(record: Mapping[str, Any]) -> str:
    """Of everything in a record but this: a configuration with a changed bit would train something else."""
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())

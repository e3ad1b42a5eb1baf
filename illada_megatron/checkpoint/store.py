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

from illada_megatron.checkpoint.files.agreement import of_all, of_first, rank_and_size
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.integrity import FileRecord, damage
from illada_megatron.checkpoint.files.patience import patiently
from illada_megatron.checkpoint.files.storage import Folder, folder
from illada_megatron.checkpoint.files.stored_record import check_record
from illada_megatron.config import CheckpointConfig

RECORD = "checkpoint.json"
_POINTER = "latest"
_PREFIX = "step_"
_VERSION = 3
_PACKAGES = ("illada-megatron", "torch", "megatron-core", "numpy")


@dataclass(frozen=True)
class Refusal:
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


def in_bad_steps(progress: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint with this progress was saved in a row of bad steps, when its weights may be what is bad."""
    return bool((progress or {}).get("bad_steps", {}).get("streak"))


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


def checkpoint_to_continue(settings: CheckpointConfig, good: bool = False) -> tuple[CheckpointInfo | None, list[str]]:
    """The checkpoint that a run continues from (save_dir's if it has one, else load_dir's, which has to have one), and
    why others were refused. Every rank calls it; raises CheckpointError and OSError as `newest_complete` does.

    good: none that was saved in a row of bad steps.
    """
    save_dir, load_dir = settings.save_dir, settings.load_dir
    refused: list[str] = []
    if save_dir and seen_by_any(folder(save_dir)):
        info, refused = newest_complete(save_dir, settings.verify, good)
        if info is not None:
            return info, refused
    if load_dir is None:
        return None, refused
    seen_by_any(folder(load_dir))
    info, more = newest_complete(load_dir, settings.verify, good)
    if info is None and not good:
        raise CheckpointError(f"{load_dir}: holds no checkpoint; leave checkpoint.load_dir out to start from step 0")
    return info, refused + more


def newest_complete(
    load_dir: str | PathLike[str] | Folder, checksums: bool = True, good: bool = False
) -> tuple[CheckpointInfo | None, list[str]]:
    """The newest complete and intact checkpoint below `load_dir` (or `load_dir` itself, if it is one), and why newer
    ones were refused. None where there is none, or only interrupted ones: nothing was ever complete, nothing is lost.

    good: one that was saved in a row of bad steps is refused too.

    Every rank of a run calls it: rank 0 reads the names and the records, all share the files (checksums=False: only
    sizes are compared), and they agree.

    Raises CheckpointError where the directory does not exist, or where checkpoints that were complete are damaged
    and no good one is left; OSError where some rank cannot read, which says nothing about the checkpoint.
    """
    place = folder(load_dir)
    refused: list[str] = []
    damaged = False
    for name in of_first(lambda: patiently(lambda: _candidates(place))):
        path = place if place.name == name else place / name
        found = of_first(lambda path=path: read_record(path))  # type: ignore[misc]
        if good and isinstance(found, CheckpointInfo) and in_bad_steps(found.progress):
            found = Refusal(f"{path}: was saved in a row of bad steps", True)
        if isinstance(found, CheckpointInfo):
            found = _refused_by_any(found, checksums) or found
        if isinstance(found, CheckpointInfo):
            return found, refused
        refused.append(found.reason)
        damaged |= not found.interrupted
    if damaged:
        raise CheckpointError(
            f"{place}: no intact checkpoint; repair one, or give an empty checkpoint.save_dir to start anew:\n  "
            + "\n  ".join(refused)
        )
    return None, refused


def _candidates(place: Folder) -> list[str]:
    if not place.exists():
        raise CheckpointError(f"{place}: no such directory, expected an earlier run's checkpoints: correct the path")
    if place.name.startswith(_PREFIX):
        return [place.name]
    return [path.name for path in checkpoints_newest_first(place)]


def seen_by_any(save_dir: Folder) -> bool:
    """Whether it is there. Every rank calls it. Raises OSError where others see it, but rank 0 does not: the run would
    begin anew."""
    seen = of_all(lambda: patiently(save_dir.exists))
    if any(seen) and not seen[0]:
        raise OSError(
            f"{save_dir}: is not seen by rank 0, but by rank {seen.index(True)}: is this file system mounted, and the "
            "same, on every machine? Start the run again when it is"
        )
    return seen[0]


def _refused_by_any(info: CheckpointInfo, checksums: bool) -> Refusal | None:
    """Whether some rank finds the files of its share other than they were written. Raises OSError on all ranks where
    one of them cannot read its share."""
    rank, size = rank_and_size()
    share = {name: info.files[name] for name in sorted(info.files)[rank::size]}

    def look() -> str | None:
        patiently(lambda: _require_visible(info.path))
        return damage(info.path, share, checksums)

    try:
        found = of_all(look)
    except OSError as error:
        raise OSError(
            f"{info.path}: cannot be read now, which says nothing about the checkpoint: {error}: start the run again "
            "when the storage answers; where it stays so, move the folder away, and the run continues from the one "
            "before"
        ) from error
    return next((Refusal(reason, False) for reason in found if reason is not None), None)


def _require_visible(path: Folder) -> None:
    """A machine without the file system, or with an old view of it, would call every file missing."""
    if path.size(RECORD) is None:
        raise OSError(
            f"{path}/{RECORD}: is not seen here, but by rank 0: is this file system mounted, and the same, on every "
            "machine? Or does another run delete it?"
        )


def checkpoints_newest_first(save_dir: Folder) -> list[Folder]:
    """Folders of steps below `save_dir`, complete or not."""
    names = (name for name in save_dir.folders() if name.startswith(_PREFIX))
    steps = [name for name in names if name.removeprefix(_PREFIX).isdecimal()]
    return [save_dir / name for name in sorted(steps, key=step_of, reverse=True)]


def read_record(path: Folder) -> CheckpointInfo | Refusal:
    """What the record of `path` says, if it says what it did when it was written; the files are `damage`'s to compare.
    Raises OSError where it cannot be read, after some tries; CheckpointError where another version wrote it."""
    file = f"{path}/{RECORD}"
    try:
        record = json.loads(patiently(lambda: path.read(RECORD)))
        intact = record.pop("checksum", None) == _own_checksum(record)
        if (found := record.pop("version", None)) != _VERSION:
            other = f"{file}: version {found}, this program reads {_VERSION}"
            if not intact:
                return Refusal(other, False)
            # no damage: the run would fall back, and then delete what it cannot read
            raise CheckpointError(
                f"{other}: use the program that wrote it, or move the folder away to go on from an older checkpoint"
            )
        if not intact:
            return Refusal(f"{file}: its bytes have changed: they do not have the checksum that it names", False)
        check_record(record)
        return CheckpointInfo(path=path, **record)
    except FileNotFoundError:
        return Refusal(f"{path}: interrupted while it was written ({RECORD} is missing)", True)
    except json.JSONDecodeError as error:
        return Refusal(f"{file}: not JSON: {error}", False)
    except UnicodeDecodeError as error:
        return Refusal(f"{file}: not text: {error}", False)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        return Refusal(f"{file}: not a checkpoint's record: {error!r:.500}", False)


def _own_checksum(record: Mapping[str, Any]) -> str:
    """Of everything in a record but this: a configuration with a changed bit would train something else."""
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())

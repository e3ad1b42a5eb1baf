"""The places that a run writes to: looked at before anything long is done, by rank 0.

A path that can never be written is an error where a run begins; where one goes on, there is something to lose, and
what cannot be written is said (`logs.py`, `checkpoint/saver.py`). Another run's log or TensorBoard folder always is.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import orjson

from illada_megatron.checkpoint.files.agreement import of_first
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.store import checkpoints_newest_first
from illada_megatron.config import RunConfig
from illada_megatron.config.load import to_yaml
from illada_megatron.runs.records import newest_start, start_number
from illada_megatron.system.whole_file import replaced

RUN_NAME_FILE = "run.txt"
"""In a TensorBoard folder: whose it is."""
_MOST_LINE_BYTES = 1 << 20


def name_of(config: RunConfig) -> str | None:
    """By which the run is known again: where its checkpoints lie, for that is what it goes on from; else its run_dir.
    None: each start is a run of its own."""
    return config.checkpoint.save_dir or config.run_dir


def same_run(one: str, another: str) -> bool:
    """Whether two names are one; a path may be written in several ways."""
    one, another = one.rstrip("/"), another.rstrip("/")
    if one == another or "://" in one + another:
        return one == another
    try:
        return Path(one).resolve() == Path(another).resolve() or Path(one).samefile(another)
    except OSError:  # one of them is not there
        return False


def is_own(place: Path, owner: str, own: str) -> bool:
    """Whether a log or a TensorBoard folder that `owner` wrote is that of the run named `own`: of the same run, or of a
    folder with all of a run's files that was moved or copied, and goes on under its new name."""
    if same_run(owner, own):
        return True
    if "://" in owner + own or Path(owner).name != Path(own).name:
        return False
    here, theirs = (Path(one).resolve().parent for one in (own, owner))
    apart = not (theirs.is_relative_to(here) or here.is_relative_to(theirs))
    return apart and place.resolve().is_relative_to(here)


@contextmanager
def free_places(config: RunConfig) -> Iterator[None]:
    """Enter with every rank, before anything long. Raises OSError where a path can never be written and the run has no
    checkpoint to lose, CheckpointError where a log is another run's; on all ranks."""
    of_first(lambda: check(config))
    yield


def check(config: RunConfig) -> None:
    """What `free_places` has rank 0 do."""
    paths = {
        "run_dir": config.run_dir,
        "checkpoint.save_dir": config.checkpoint.save_dir,
        "logging.tensorboard_dir": config.logging.tensorboard_dir,
        "logging.jsonl_path": config.logging.jsonl_path,
    }
    local = {field: Path(path) for field, path in paths.items() if path is not None and "://" not in path}
    if not _has_checkpoints(config):
        for field, path in local.items():
            _require_writable(field, path, is_folder=field != "logging.jsonl_path")
    owners = {"logging.tensorboard_dir": _owner_of_board, "logging.jsonl_path": _owner_of_log}
    for field, owner_of in owners.items():
        owner = owner_of(local[field]) if field in local else None
        own = name_of(config)
        # a run whose place is gone is no more: its log is put aside (`logs.StepLog`)
        there = owner is not None and ("://" in owner or Path(owner).exists())
        if owner is not None and there and (own is None or not is_own(local[field], owner, own)):
            raise CheckpointError(
                f"{field} {local[field]} belongs to another run, {owner}; this one is "
                f"{own or 'not named by a run_dir or a checkpoint.save_dir'}: give each run its own folder (run_dir), "
                f"or another {field}, or move what is there away"
            )


def write_start(config: RunConfig, world_size: int) -> Path | None:
    """Keep the resolved configuration of this start in run_dir, with what started it; nothing that is there is
    replaced. None: there is no run_dir. Rank 0 calls it; raises OSError."""
    if config.run_dir is None:
        return None
    place = Path(config.run_dir)
    place.mkdir(parents=True, exist_ok=True)
    newest = newest_start(place)
    number = 1 + (start_number(newest) if newest is not None else 0)
    path = place / f"start_{number:04d}.yaml"
    packages = ", ".join(f"{name} {version(name)}" for name in ("illada-megatron", "torch", "megatron-core"))
    head = [
        f"started {datetime.now(UTC).isoformat(timespec='seconds')} on {os.uname().nodename}, {world_size} ranks",
        shlex.join(["illada", *sys.argv[1:]]).replace("\n", " "),
        f"{packages}, Python {sys.version.split()[0]}",
    ]
    with replaced(path) as file:
        file.write("".join(f"# {line}\n" for line in head).encode() + to_yaml(config).encode())
    return path


def claim_board(directory: str, name: str | None) -> bool:
    """Leave the run's name in its TensorBoard folder. Returns whether there are curves of a run that left none. Raises
    OSError."""
    if "://" in directory:
        return False
    place = Path(directory)
    unnamed = _owner_of_board(place) is None and any(place.glob("events.out.tfevents.*"))
    if name is not None:
        place.mkdir(parents=True, exist_ok=True)
        with replaced(place / RUN_NAME_FILE) as file:
            file.write(f"{name}\n".encode())
    return unnamed


def _has_checkpoints(config: RunConfig) -> bool:
    """Of its own, or what may be one; where nobody can look, later steps say why."""
    if config.checkpoint.save_dir is None:
        return False
    try:
        return bool(checkpoints_newest_first(folder(config.checkpoint.save_dir)))
    except OSError:
        return "://" in config.checkpoint.save_dir


def _require_writable(field: str, path: Path, is_folder: bool) -> None:
    """Nothing is made: what fails before the run begins leaves nothing behind."""
    there = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    wrong: type[OSError] | None = None
    if there == path and not is_folder:
        wrong = IsADirectoryError if path.is_dir() else None
    elif not there.is_dir():
        wrong = NotADirectoryError
    if wrong is not None:
        raise wrong(f"{field} {path}: cannot be written: {there} is {_kind(there)}: name another path")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{field} {path}: cannot be written: no permission to write {there}: name another path")


def _kind(path: Path) -> str:
    return "a directory" if path.is_dir() else "a file, expected a directory" if path.exists() else "a link to nothing"


def _owner_of_log(path: Path) -> str | None:
    """Who wrote the first line of a step log; None: nobody, or one that did not say."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            record = orjson.loads(file.readline(_MOST_LINE_BYTES))
        owner = record.get("save_dir") or record.get("run_dir")
    except (OSError, ValueError, AttributeError):
        return None
    return owner if isinstance(owner, str) else None


def _owner_of_board(path: Path) -> str | None:
    try:
        return (path / RUN_NAME_FILE).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None

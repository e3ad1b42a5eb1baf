"""Checkpoints of any kind, opened by their path: which kind it is, what it says of itself, its tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from illada_megatron.checkpoint import store
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.integrity import damage
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.metadata import read_object
from illada_megatron.checkpoint.files.restricted_unpickler import load_plain
from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.checkpoint.megatron import args as megatron_args
from illada_megatron.checkpoint.megatron import legacy_layout
from illada_megatron.checkpoint.megatron.dist import MegatronDistSource
from illada_megatron.checkpoint.megatron.legacy_files import LegacySource, find_slots
from illada_megatron.checkpoint.store import CheckpointInfo
from illada_megatron.checkpoint.tools.sources import Source
from illada_megatron.config import ConfigError, RunConfig, load_config

Kind = Literal["torch_dist", "legacy", "megatron-core torch_dist"]
_MASK_TOKEN = "model.mask_token_id"


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose record was read and whose files have the right sizes."""

    kind: Kind
    info: CheckpointInfo
    config: RunConfig
    """That it was saved with."""
    source: Source
    refused: tuple[str, ...] = ()
    """Why newer checkpoints of the directory were not taken."""


def open_checkpoint(path: str, overrides: Sequence[str] = ()) -> OpenCheckpoint:
    """The newest complete checkpoint of a directory (or `s3://` prefix), or the one that `path` itself is.

    overrides: `section.field=value` on the configuration of a checkpoint that Megatron has written, whose arguments do
    not say everything. Checksums are not compared. Raises CheckpointError, ConfigError, OSError.
    """
    place = folder(path)
    local = place.path if isinstance(place, LocalFolder) else None
    if local is not None and local.is_dir():
        if (local / legacy_layout.TRACKER).is_file() or local.name.startswith(legacy_layout.ITERATION_PREFIX):
            return _of_megatron(_iteration(local), overrides)
        if (local / ".metadata").is_file() and not (local / store.RECORD).is_file():
            return _megatron_dist(local, overrides)
    info, refused = store.newest_complete(place, checksums=False)
    if info is None:
        raise CheckpointError(f"{place}: holds no checkpoint" + "".join(f"\n  {reason}" for reason in refused))
    config = _config(info.config, info.path, ())
    return OpenCheckpoint("torch_dist", info, config, TensorReader(info.path), tuple(refused))


def _iteration(local: Path) -> Path:
    tracker = local / legacy_layout.TRACKER
    if not tracker.is_file():
        return local
    with tracker.open("rb") as file:
        text = file.read(40).strip()
    if not text.isdigit():  # of bytes: 0 to 9
        raise CheckpointError(f"{tracker}: says {text!r}, expected the number of an iteration")
    directory = legacy_layout.iteration_directory(local, int(text))
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is missing, but {tracker} names it")
    return directory


def _of_megatron(directory: Path, overrides: Sequence[str]) -> OpenCheckpoint:
    if (directory / ".metadata").is_file():
        return _megatron_dist(directory, overrides)
    ranks = sorted(directory.glob(f"mp_rank_*/{legacy_layout.MODEL_FILE}"))
    if not ranks:
        raise CheckpointError(f"{directory}: has no mp_rank_*/{legacy_layout.MODEL_FILE}: not a checkpoint of Megatron")
    if (directory / store.RECORD).is_file():  # one that `reshard` has written
        found = store.read_record(LocalFolder(directory))
        if not isinstance(found, CheckpointInfo):
            raise CheckpointError(found.reason)
        if (problem := damage(found.path, found.files, checksums=False)) is not None:
            raise CheckpointError(problem)
        config = _config(found.config, directory, ())
        slots, _ = find_slots(directory, config)
        return OpenCheckpoint("legacy", found, config, LegacySource(config, slots))
    state = load_plain(ranks[0])
    version = state.get("checkpoint_version") if isinstance(state, dict) else None
    if version != legacy_layout.CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{ranks[0]}: checkpoint_version {version}, expected {legacy_layout.CHECKPOINT_VERSION}: older ones order "
            "queries, keys and values otherwise; load and save it with Megatron"
        )
    args = state.get("args")
    config = _config(megatron_args.config_values(args, ranks[0]), directory, overrides, says_mask_token=False)
    slots, steps = find_slots(directory, config)
    return _opened("legacy", directory, config, args, state.get("iteration"), steps, LegacySource(config, slots))


def _megatron_dist(directory: Path, overrides: Sequence[str]) -> OpenCheckpoint:
    common, state = _common_state(directory)
    args = state.get("args") if isinstance(state, dict) else None
    config = _config(megatron_args.config_values(args, common), directory, overrides, says_mask_token=False)
    source = MegatronDistSource(TensorReader(directory), config.model, config.training.precision != "fp32")
    steps = 0
    if any(name.startswith("optimizer.") for name in source.tensors):
        steps = _steps(state.get("optimizer"), common)
    return _opened("megatron-core torch_dist", directory, config, args, state.get("iteration"), steps, source)


def _common_state(directory: Path) -> tuple[Path, Any]:
    """What megatron-core keeps once and not by shards, and the file that holds it: an object among the tensors, or
    common.pt (before 0.19)."""
    common = directory / "common.pt"
    if common.is_file():
        return common, load_plain(common)
    content = read_object(LocalFolder(directory), "common_state")
    if content is None:
        raise CheckpointError(f"{directory}: has neither common.pt nor an object common_state: not megatron-core's")
    state = load_plain(directory / ".metadata", content)
    return directory / ".metadata", state[0] if isinstance(state, list) and state else None


def _steps(optimizer: Any, common: Path) -> int:
    """Adam's, of the param groups that megatron-core puts into its common state."""
    inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, dict) else {}
    found = {int(group["step"]) for group in inner.get("param_groups", []) if group.get("step") is not None}
    if len(found) != 1:
        raise CheckpointError(
            f"{common}: its optimizer's groups have done {sorted(found)} steps, expected one number: Adam's of Apex, "
            "Transformer Engine or this program count so, torch's does not"
        )
    return found.pop()


def _opened(
    kind: Kind, directory: Path, config: RunConfig, args: Any, iteration: Any, steps: int, source: Source
) -> OpenCheckpoint:
    if not isinstance(iteration, int):
        raise CheckpointError(f"{directory}: its iteration is {iteration!r:.40}, expected a number")
    has_state = any(name.startswith("optimizer.") for name in source.tensors)
    progress = megatron_args.progress(args, iteration, steps) if has_state else None
    dumped = config.model_dump(mode="json")
    info = CheckpointInfo(path=LocalFolder(directory), step=iteration, config=dumped, progress=progress)
    return OpenCheckpoint(kind, info, config, source)


def _config(values: dict[str, Any], path: object, overrides: Sequence[str], says_mask_token: bool = True) -> RunConfig:
    if not says_mask_token and not any(text.startswith(f"{_MASK_TOKEN}=") for text in overrides):
        raise ConfigError(
            f"{path}: Megatron's arguments have no {_MASK_TOKEN}: give the id of the mask, as {_MASK_TOKEN}=5"
        )
    return load_config(values, overrides, source=str(path))

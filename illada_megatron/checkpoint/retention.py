"""Which older checkpoints go when a newer one is complete."""

import shutil
from pathlib import Path

from illada_megatron.checkpoint.integrity import RECORD
from illada_megatron.checkpoint.store import checkpoints_newest_first, step_of


def prune(save_dir: Path, keep_last: int | None, keep_every: int | None) -> list[str]:
    """Delete what the configuration does not keep: all complete checkpoints but the newest `keep_last` (None: all are
    kept) and those whose step is a multiple of `keep_every`, and what interrupted saves left behind the newest.

    One rank calls it, after a checkpoint is complete. Its record goes first: a half-deleted directory is no checkpoint.
    Returns what could not be deleted, and why; that is no reason to end a run.
    """
    if keep_last is None:
        return []
    paths = checkpoints_newest_first(save_dir)
    complete = [path for path in paths if (path / RECORD).is_file()]
    if not complete:
        return []
    kept = {*complete[:keep_last], *(path for path in complete if keep_every and step_of(path) % keep_every == 0)}
    failures = []
    for path in paths:
        if path in kept or step_of(path) > step_of(complete[0]):
            continue
        try:
            (path / RECORD).unlink(missing_ok=True)
            shutil.rmtree(path)
        except OSError as error:
            failures.append(f"{path} could not be deleted: {error}")
    return failures

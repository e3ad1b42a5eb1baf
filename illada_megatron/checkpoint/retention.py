"""Which older checkpoints go when a newer one is complete."""

from illada_megatron.checkpoint.files.storage import Folder
from illada_megatron.checkpoint.store import RECORD, checkpoints_newest_first, step_of


def prune(save_dir: Folder, keep_last: int | None, keep_every: int | None) -> list[str]:
    """Delete what the configuration does not keep: all complete checkpoints but the newest `keep_last` (None: all are
    kept) and those whose step is a multiple of `keep_every`, and what interrupted saves left behind the newest.

    One rank calls it, after a checkpoint is complete. Its record goes first: a half-deleted directory is no checkpoint.
    Returns what could not be deleted, and why; that is no reason to end a run.
    """
    if keep_last is None:
        return []
    try:
        paths = checkpoints_newest_first(save_dir)
    except OSError as error:
        return [f"{save_dir} could not be listed: {error}"]
    complete = [path for path in paths if path.size(RECORD) is not None]
    if not complete:
        return []
    newest = step_of(complete[0].name)
    kept = {path.name for path in complete[:keep_last]}
    kept |= {path.name for path in complete if keep_every and step_of(path.name) % keep_every == 0}
    failures = []
    for path in paths:
        if path.name in kept or step_of(path.name) > newest:
            continue
        try:
            path.remove(RECORD)
            path.clear()
        except OSError as error:
            failures.append(f"{path} could not be deleted: {error}")
    return failures

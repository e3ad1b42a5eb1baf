"""Which checkpoints go when another is complete."""

from collections.abc import Collection, Sequence

from illada_megatron.checkpoint.files.storage import Folder
from illada_megatron.checkpoint.store import RECORD, checkpoints_newest_first, step_of


def prune(
    save_dir: Folder,
    saved: Sequence[int],
    base: int | None,
    there: Collection[int],
    begun: Collection[int],
    keep_last: int | None,
    keep_every: int | None,
) -> list[str]:
    """Delete what is not kept, after the checkpoint of step saved[-1] is complete, which stays. One rank calls it.

    saved: steps that this run has saved since it went on from the checkpoint of step `base` (None: from none here),
    ascending, without those it has gone back behind. there: those for which a folder was there when this attempt began;
    begun: those that it has begun to save. Whatever else is there belongs to an attempt that has taken over, and stays.

    What lies after `base` and is not in `saved` was refused, or is of steps that are being done again: it goes, as does
    what has no record, which was interrupted. Of the rest, the complete ones up to `base` and those of `saved`, the
    newest `keep_last` (None: all) stay and those whose step is a multiple of `keep_every`. A run that went on from none
    here leaves alone what was there, is complete and newer than its first.

    A record goes first: a half-deleted directory is no checkpoint. Returns what could not be deleted, and why; that is
    no reason to end a run.
    """
    try:
        paths = [path for path in checkpoints_newest_first(save_dir) if step_of(path.name) in {*there, *begun}]
    except OSError as error:
        return [f"{save_dir} could not be listed, nothing is deleted: {error}"]
    failures: list[str] = []
    kept = 0
    for path in paths:
        step = step_of(path.name)
        try:
            if step in saved or path.size(RECORD) is not None:
                if step in saved or step <= (saved[0] if base is None else base):
                    kept += 1
                    stays = keep_last is None or kept <= keep_last or bool(keep_every and step % keep_every == 0)
                else:
                    stays = base is None and step not in begun
                if stays or step == saved[-1]:
                    continue
            path.remove(RECORD)
            path.clear()
        except OSError as error:
            failures.append(f"{path} could not be deleted: {error}")
    return failures

"""Directories that are there as a whole or not at all."""

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.local_files import sync

_UNFINISHED = ".unfinished"
# what file systems without locks answer; what a killed process left there stays, as it may be another's at work
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def staged(target: Path, nbytes: int) -> Iterator[Path]:
    """A new directory beside `target` to write into; it becomes `target` at the end of the block, durably, or goes when
    the block fails. What killed processes left of such directories is removed first.

    nbytes: that will be written. Raises CheckpointError where `target` exists or is no path of this machine, or the
    disk has not enough room.
    """
    if target.parts[:1] == ("s3:",):
        raise CheckpointError(f"{target}: is written on this machine's disks only: name a directory, and upload it")
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: exists already: name a new directory, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*{_UNFINISHED}"):
        _remove_unless_used(leftover)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise CheckpointError(f"{target.parent}: has room for {free:,} bytes, {nbytes:,} are to be written")
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}{_UNFINISHED}"
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(descriptor)
        yield temporary
        for directory, _, _ in os.walk(temporary):
            sync(Path(directory))
        temporary.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _remove_unless_used(leftover: Path) -> None:
    descriptor = os.open(leftover, os.O_RDONLY)
    try:
        if _try_lock(descriptor):
            shutil.rmtree(leftover)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """The lock ends with this process, however that ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in {*_NO_LOCKS, errno.EWOULDBLOCK}:
            raise
        return False
    return True

"""Directories that are there as a whole or not at all."""

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.system.whole_file import sync

_UNFINISHED, _TOKEN_BYTES = ".unfinished", 4
# A run's checkpoint (`store.step_directory`): retention deletes it as a whole, and without a record takes it for
# an interrupted one.
_CHECKPOINT = re.compile(r"step_\d{8,}")
# what file systems without locks answer; what a killed process left there stays, as it may be another's at work
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def staged(target: Path, nbytes: int, may_be_empty: bool = False) -> Iterator[Path]:
    """A new directory beside `target` to write into; it becomes `target` at the end of the block, durably, or goes when
    the block fails, with the directories that were made above it. What killed processes of this machine left of such
    directories is removed first.

    nbytes: that will be written; may_be_empty: `target` may be there as an empty directory. Raises CheckpointError, all
    before the block, where `target` exists, is no path of this machine or nothing that a directory can be renamed to,
    or the disk has not enough room.
    """
    _check_target(target, may_be_empty)
    with made(target.parent), _beside(target, nbytes) as temporary:
        yield temporary


@contextmanager
def made(directory: Path) -> Iterator[None]:
    """Make `directory` and those above it; what was not there before goes again when the block fails, unless something
    is in it then."""
    new = [one for one in (directory, *directory.parents) if not one.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for one in new:
            try:
                one.rmdir()
            except OSError:  # not made, or another has written into it
                continue
        raise


def _check_target(target: Path, may_be_empty: bool) -> None:
    if target.parts[:1] == ("s3:",):
        raise CheckpointError(f"{target}: is written on this machine's disks only: name a directory, and upload it")
    if target.is_symlink():
        raise CheckpointError(
            f"{target}: is a symbolic link to {target.readlink()}, expected a new directory: name another, or remove it"
        )
    if target.name == "..":
        raise CheckpointError(f"{target}: ends in `..`, expected the name of a new directory")
    for one in (Path(target.name), *target.parent.resolve().parents, target.parent.resolve()):
        if _CHECKPOINT.fullmatch(one.name):
            raise CheckpointError(
                f"{target}: is named as, or lies in, a run's checkpoint ({one.name}), which that run deletes when it "
                "keeps it no longer (checkpoint.keep_last): name a directory elsewhere"
            )
    if not target.exists():
        return
    if not may_be_empty:
        raise CheckpointError(f"{target}: exists already: name a new directory, or remove it first")
    if not target.is_dir() or any(target.iterdir()):
        raise CheckpointError(f"{target}: exists and is not empty: give another directory, or remove it first")
    # the new directory takes the place of the empty one
    if target.samefile(Path.cwd()):
        raise CheckpointError(
            f"{target}: is the current directory, which would be replaced under the shell's feet: name a new directory "
            f"in it, as {target / 'exported'}"
        )
    if target.is_mount():
        raise CheckpointError(
            f"{target}: is a mount point, which cannot be replaced: name a new directory in it, as "
            f"{target / 'exported'}"
        )


@contextmanager
def _beside(target: Path, nbytes: int) -> Iterator[Path]:
    # Of this machine only: on NFS a directory's lock is not seen on others, where one may be at work.
    machine = f".{target.name}@{socket.gethostname()}."
    for leftover in target.parent.glob(f"{glob.escape(machine)}{'?' * 2 * _TOKEN_BYTES}{_UNFINISHED}"):
        _remove_unless_used(leftover)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise CheckpointError(f"{target.parent}: has room for {free:,} bytes, {nbytes:,} are to be written")
    temporary = target.parent / f"{machine}{secrets.token_hex(_TOKEN_BYTES)}{_UNFINISHED}"
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

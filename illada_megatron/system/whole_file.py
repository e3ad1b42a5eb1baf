"""A file that is there as a whole or not at all."""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = r"\.[0-9a-f]{16}\.tmp"
"""What `temporary_suffix` gives, as a regular expression."""


def temporary_suffix() -> str:
    """For the name of a file that is being written: another for each writer, so that writers on any number of machines
    share none, and nobody can guess it."""
    return f".{secrets.token_hex(8)}.tmp"


@contextmanager
def replaced(path: Path, give_name: Callable[[Path, Path], object] = Path.replace) -> Iterator[BinaryIO]:
    """A new file to write into; it takes the place of `path` at the end of the block, durably, or goes when the block
    fails. Raises OSError.

    Its name has to be new: who may write into the directory cannot put a link there through which another file would be
    overwritten. A link at `path` itself is replaced, not followed.

    give_name: (the new file, complete and on the device; path), where an older file should not simply be replaced.
    """
    temporary = path.with_name(path.name + temporary_suffix())
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        give_name(temporary, path)
    except BaseException:
        with suppress(OSError):  # of a disk that fails, the first error says more
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(directory: Path) -> None:
    """Make the names in a directory durable: they survive a power failure only when it has reached the device too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot flush a directory; they order renames themselves
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP):
            error.filename = str(directory)
            raise
    finally:
        os.close(descriptor)

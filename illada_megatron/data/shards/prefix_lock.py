"""Who is at work under a prefix: PREFIX.lock, which is there from the first job on and is never removed."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from illada_megatron.data.errors import DataError

# what file systems without locks answer
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def lock_path(prefix: str) -> Path:
    return Path(prefix + ".lock")


@contextmanager
def locked_prefix(prefix: str) -> Iterator[bool]:
    """Hold the lock within the block: it ends with this process, however that ends. A file that is never removed can
    be locked before anything is known or written; one that comes and goes is now and then two files.

    Gives False where the file system has no locks: then others may be at work, and what keeps them apart is that
    `durable.publish` replaces nothing. Raises DataError while another process has the lock."""
    path = lock_path(prefix)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{path}: another process is making this corpus; wait for it or choose another output prefix"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                error.filename = str(path)
                raise
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)

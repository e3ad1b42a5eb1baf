"""Files that get their names when they are whole and on the device, and never take another's name by accident."""

import ctypes
import errno
import filecmp
import os
from pathlib import Path

from illada_megatron.data.errors import DataError
from illada_megatron.system.whole_file import replaced, sync

# Whatever else a file system answers to link() means that it has no hard links: EPERM, EOPNOTSUPP, EINVAL, EXDEV,
# ENOTTY, EACCES (SMB), 524 (ENOTSUPP). Where it means something else, renaming fails likewise.
_FAILURES = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENOENT, errno.EEXIST}
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def write_whole(path: Path, content: bytes, replace: bool = True) -> None:
    """Readers see no file, the older one or this one. replace False: as `publish`, so that no older one is lost."""
    with replaced(path, Path.replace if replace else publish) as file:
        file.write(content)


def publish(temporary: Path, path: Path) -> None:
    """Give `temporary`, complete and on the device, the name `path` for good. A file of that name stays: it is what was
    to be published if its bytes are the same, else DataError is raised. `temporary` is gone afterwards.

    Without locks too, of two writers one wins, and nothing that has its name is ever replaced under a reader."""
    try:
        name_once(temporary, path)
    except FileExistsError:
        _require_same(temporary, path)
    except FileNotFoundError as error:
        raise DataError(
            f"{temporary}: was removed before it got its name: another job has taken over its place, or somebody "
            "has cleaned up"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def name_once(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path`, and leave it no other. Raises FileExistsError where there is something of that
    name, FileNotFoundError where `temporary` is gone, and OSError."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno in _FAILURES:
            raise
        _rename_once(temporary, path)
    else:
        temporary.unlink(missing_ok=True)


def _rename_once(temporary: Path, path: Path) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
            return
        error = ctypes.get_errno()
        if error not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(error, os.strerror(error), str(temporary), None, str(path))
    # looking and renaming are two steps there: the lock on the prefix has to keep others away in between
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary.rename(path)


def _require_same(temporary: Path, path: Path) -> None:
    if not filecmp.cmp(temporary, path, shallow=False):
        raise DataError(
            f"{path}: there already ({path.stat().st_size} bytes), and not what was to be written here "
            f"({temporary.stat().st_size} bytes): it was damaged, or another job has this name: remove this file and "
            "run the same command again, or choose another output prefix"
        )

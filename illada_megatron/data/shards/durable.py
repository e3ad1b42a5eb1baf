"""Files that get their names when they are whole and on the device, and never take another's name by accident."""

import errno
import filecmp
import os
from pathlib import Path

from illada_megatron.data.errors import DataError
from illada_megatron.system.whole_file import replaced, sync

# what file systems without hard links answer
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


def write_whole(path: Path, content: bytes, replace: bool = True) -> None:
    """Readers see no file, the older one or this one. replace False: as `publish`, so that no older one is lost."""
    with replaced(path, Path.replace if replace else publish) as file:
        file.write(content)


def publish(temporary: Path, path: Path) -> None:
    """Give `temporary`, complete and on the device, the name `path` for good. A file of that name stays: it is what was
    to be published if its bytes are the same, else DataError is raised. `temporary` is gone afterwards.

    Without locks too, of two writers one wins, and nothing that has its name is ever replaced under a reader."""
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            _require_same(temporary, path)
        except FileNotFoundError as error:
            raise DataError(
                f"{temporary}: was removed before it got its name: another job has taken over its place, or somebody "
                "has cleaned up"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # looking and renaming are two steps there: the lock on the prefix has to keep others away in between
            if path.exists():
                _require_same(temporary, path)
            else:
                temporary.rename(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _require_same(temporary: Path, path: Path) -> None:
    if not filecmp.cmp(temporary, path, shallow=False):
        raise DataError(
            f"{path}: there already ({path.stat().st_size} bytes), and not what was to be written here "
            f"({temporary.stat().st_size} bytes): another job has this name; choose another output prefix, or remove "
            "what is there"
        )

"""Errors of a file system or of object storage that may pass."""

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

_PAUSES_SECONDS = (0.5, 2.0, 5.0)
# What another try would only meet again.
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


def patiently(action: Callable[[], Value]) -> Value:
    """What `action` returns; it is done again, a few times within seconds, where it raises an OSError that may pass.
    Raises the last one."""
    for pause in _PAUSES_SECONDS:
        try:
            return action()
        except _LASTING:
            raise
        except OSError:
            time.sleep(pause)
    return action()

"""A command for a limited time, with all that it has started."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

_GRACE_SECONDS = 15


def run_limited(command: list[str], folder: Path, seconds: float, **options: Any) -> tuple[int | None, str]:
    """(exit code, or None where it was cut off after `seconds`; what it wrote to stdout where `options` say PIPE).

    Cut off it is interrupted, as by Ctrl-C, so that it can write what it has found; what is left of it and of what it
    has started is killed, as the GPU is measured next."""
    process = subprocess.Popen(command, cwd=folder, text=True, start_new_session=True, **options)
    try:
        out, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        _kill_group(process)
        with suppress(subprocess.TimeoutExpired):  # what has left the group may hold its stdout
            out = process.communicate(timeout=_GRACE_SECONDS)[0]
            return None, out or ""
        return None, ""
    finally:
        _kill_group(process)
    return process.returncode, out or ""


def _kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

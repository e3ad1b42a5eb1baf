"""The memory that a piece of work needs on top of what the process holds already."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5): VmHWM becomes the present resident size


class PeakMemory:
    """Measures from its making on: resident memory of the process, or what torch allocated on a GPU."""

    def __init__(self, on_cuda: bool) -> None:
        self._peak = _peak_on_cuda if on_cuda else _peak_resident
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        if not sys.platform.startswith("linux"):
            raise OSError(f"peak memory of a repetition is read from Linux's /proc, this is {sys.platform}")
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken without showing up
        _CLEAR.write_text(_RESET_PEAK)
        self._before = _peak_resident()

    def extra_bytes(self) -> int:
        """The most that was held since, above what was held then."""
        return self._peak() - self._before


def _peak_resident() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


_peak_on_cuda: Callable[[], int] = torch.cuda.max_memory_allocated

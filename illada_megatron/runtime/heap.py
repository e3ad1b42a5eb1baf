"""Free memory that the C library keeps."""

import ctypes
from functools import cache


def release_free_heap() -> None:
    """Give back to Linux what glibc's heap holds free; elsewhere nothing is done.

    torch allocates tensors of up to 32 MB there on a CPU. A backward pass leaves it full of holes that the next
    micro-batch does not quite fit in, and that logits cannot use at all. Pages that are used again cost a fault.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    return getattr(ctypes.CDLL(None), "malloc_trim", None)

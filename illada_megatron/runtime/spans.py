"""Names for what a rank is doing, in the traces of torch's profiler and of NVIDIA's (training.profile)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_named: list[bool] = []  # of each who asks for the names, the last one decides: whether NVTX gets them


@contextmanager
def named_spans(nvtx: bool) -> Iterator[None]:
    """Within it `span` says its name; to NVTX instead of torch's profiler where `nvtx`."""
    _named.append(nvtx)
    try:
        yield
    finally:
        _named.pop()


def span(name: str) -> AbstractContextManager[object]:
    """What the block does, for a trace; nothing where none is recorded."""
    if not _named:
        return nullcontext()
    return torch.cuda.nvtx.range(name) if _named[-1] else torch.profiler.record_function(name)

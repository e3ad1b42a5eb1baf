"""What all ranks of a run find out together; one process alone answers for itself.

torch is imported when it is asked: the command line knows checkpoints' errors without waiting for it.
"""

from typing import TypeVar

Value = TypeVar("Value")


def rank_and_size() -> tuple[int, int]:
    """This process among those of the run."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value: Value) -> list[Value]:
    """Every rank's value, in the order of the ranks. All ranks call it."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Value | None] = [None] * size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]

"""What all ranks of a run find out together; one process alone answers for itself.

torch is imported when it is asked: the command line knows checkpoints' errors without waiting for it.
"""

from typing import Any, TypeVar

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


def collected(value: Value, group: Any) -> list[Value]:
    """Every rank's value on rank 0, an empty list on the others. All ranks call it.

    group: over all ranks, for objects on the CPU; None: this process is alone.
    """
    if group is None:
        return [value]
    import torch.distributed as dist

    rank, size = rank_and_size()
    values: list[Value | None] | None = [None] * size if rank == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []  # type: ignore[return-value]


def told(value: Value, group: Any) -> Value:
    """Rank 0's value. All ranks call it; group: as in `collected`."""
    if group is None:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]

"""What all ranks of a run find out together; one process alone answers for itself.

torch is imported when it is asked: the command line knows checkpoints' errors without waiting for it.
"""

import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from illada_megatron.checkpoint.files.errors import CheckpointError

Value = TypeVar("Value")


def rank_and_size() -> tuple[int, int]:
    """This process among those of the run."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value: Value) -> list[Value]:
    """Every rank's value, in the order of the ranks. All ranks call it; what they give is small, as each gets all."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Value | None] = [None] * size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def of_first(action: Callable[[], Value]) -> Value:
    """What `action` returns on rank 0, the only one to do it. All ranks call it; its OSError or CheckpointError is
    raised by all."""
    rank, size = rank_and_size()
    if size == 1:
        return action()
    import torch.distributed as dist

    value: Value | None = None
    error: OSError | CheckpointError | None = None
    if rank == 0:
        try:
            value = action()
        except (OSError, CheckpointError) as failure:
            error = failure
    told = [(value, error)]
    dist.broadcast_object_list(told, src=0)
    value, error = told[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def of_all(action: Callable[[], Value]) -> list[Value]:
    """What `action` returns on every rank, in the order of the ranks, as `gathered`. All ranks call it; where it raises
    OSError on any, all raise one that names the first."""
    rank, size = rank_and_size()
    value: Value | None = None
    problem: str | None = None
    try:
        value = action()
    except OSError as error:
        problem = f"rank {rank} on {socket.gethostname()}: {error}"
    answers = gathered((value, problem))
    if problems := [problem for _, problem in answers if problem is not None]:
        raise OSError(f"{problems[0]} ({len(problems)} of {size} ranks)")
    return [value for value, _ in answers]  # type: ignore[misc]


def largest(numbers: Sequence[int]) -> list[int]:
    """The largest of all ranks, for each number. All ranks call it: a small collective, which also finds out that a
    rank does not answer (runtime.distributed_timeout_minutes)."""
    if rank_and_size()[1] == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist

    on = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    together = torch.tensor(list(numbers), dtype=torch.int64, device=on)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return [int(one) for one in together.tolist()]

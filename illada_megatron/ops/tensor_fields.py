"""What is done to all tensors of a record, as moving it to another device."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")


def moved_to(record: Record, device: torch.device | str) -> Record:
    """The dataclass `record` with its tensors on `device`; from pinned memory the copies overlap with what it does."""
    return _each(record, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(record: Record) -> Record:
    """The same in page-locked memory, from which copies to a GPU are asynchronous."""
    return _each(record, Tensor.pin_memory)


def _each(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Also of the records in it."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _each(value, change)
    return dataclasses.replace(record, **changed)

"""A checkpoint of any kind as whole tensors with canonical names."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from illada_megatron.checkpoint.files.metadata import TensorInfo


class Source(Protocol):
    """What `tensors.TensorReader` offers; picklable, so that processes can share the work."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(
        self,
        name: str,
        offset: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The box of `shape` at `offset` of a whole tensor (`tensors.TensorReader.read`)."""

"""Weights of several checkpoints of one model averaged into a new one, as after annealing.

Adam's moments belong to the path that led to one of the checkpoints and not to their average: they are left out, and a
run that begins with the result makes its own.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.metadata import TensorInfo
from illada_megatron.checkpoint.files.names import tensor_name
from illada_megatron.checkpoint.tools.opening import OpenCheckpoint
from illada_megatron.checkpoint.tools.rewriting import MEMORY_MB, Content, Rewritten, rewrite
from illada_megatron.checkpoint.tools.sources import Source
from illada_megatron.config import ConfigError, ModelConfig
from illada_megatron.config.parameters import parameters

# of a bf16 block: as it is written, one that is read (fp32), the same and the sum in fp64; and a piece to cut from
_COPIES_OF_A_BLOCK = 16
# fields of a model that its weights do not depend on
_IRRELEVANT = {"max_sequence_length", "init_method", "init_method_std", "embedding_init_std"}


class AverageSource:
    """The averaged weights as a `sources.Source`, in the dtype of the first checkpoint's; summed in fp64.

    Where all checkpoints have fp32 main weights these are averaged: bf16 ones are rounded once and not in each.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], model: ModelConfig) -> None:
        """weights: sum 1. Raises CheckpointError where a source lacks a weight."""
        self._sources, self._weights = list(sources), list(weights)
        self._names: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for parameter in parameters(model):
            main = tensor_name(parameter.name, "main")
            name = main if all(main in source.tensors for source in sources) else parameter.name
            for source in sources:
                info = source.tensors.get(name)
                if info is None or info.shape != parameter.shape:
                    found = "is missing" if info is None else f"has shape {info.shape}"
                    raise CheckpointError(f"{name} {found} in a checkpoint, expected shape {parameter.shape}")
            self._names[parameter.name] = name
            dtype = sources[0].tensors[parameter.name].dtype
            self.tensors[parameter.name] = TensorInfo(parameter.shape, dtype, [])

    def read(
        self,
        name: str,
        offset: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `tensors.TensorReader.read`."""
        info = self.tensors[name]
        size = tuple(shape if shape is not None else info.shape)
        result = torch.empty(size, dtype=info.dtype) if out is None else out.view(size)
        total = torch.zeros(size, dtype=torch.float64)
        for source, weight in zip(self._sources, self._weights, strict=True):
            total.add_(source.read(self._names[name], offset, size).double(), alpha=weight)
        return result.copy_(total)


def average(
    opened: Sequence[OpenCheckpoint],
    target: Path,
    weights: Sequence[float] | None = None,
    memory_mb: int = MEMORY_MB,
    processes: int | None = None,
    verify: bool = True,
) -> Rewritten:
    """Write the average of checkpoints of one model below the new directory `target`, with the newest's configuration
    and step; see `rewrite`.

    weights: one each, divided by their sum; None: all alike. Raises CheckpointError, ConfigError, OSError.
    """
    numbers = list(weights) if weights is not None else [1.0] * len(opened)
    total = sum(numbers)
    if len(numbers) != len(opened) or not math.isfinite(total) or total <= 0:
        raise ConfigError(
            f"the weights of the average are {numbers}, expected one for each of the {len(opened)} checkpoints and a "
            "positive sum"
        )
    model = opened[0].config.model
    for one in opened[1:]:
        _check_same_model(opened[0], one)
    newest = max(opened, key=lambda one: one.info.step)
    content = Content(
        source=AverageSource([one.source for one in opened], [number / total for number in numbers], model),
        name="the average",
        step=newest.info.step,
        config=newest.config,
        progress=None,
        fingerprints=newest.info.fingerprints,
        verified=[one.info for one in opened] if verify else [],
        read_bytes=max(one.info.path.block_bytes for one in opened),
        copies_of_a_block=_COPIES_OF_A_BLOCK,
    )
    return rewrite(content, target, memory_mb=memory_mb, processes=processes)


def _check_same_model(first: OpenCheckpoint, other: OpenCheckpoint) -> None:
    ours, theirs = (one.config.model.model_dump(exclude=_IRRELEVANT) for one in (first, other))
    different = [f"model.{key} is {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if different:
        raise CheckpointError(
            f"{first.info.path} and {other.info.path} are of different models: {', '.join(different)}: average "
            "checkpoints of one model"
        )

"""The weights of a Hugging Face directory straight into a model, without a checkpoint between."""

import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from torch import nn

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.hugging_face.exporting import row_blocks
from illada_megatron.checkpoint.hugging_face.importing import Source
from illada_megatron.checkpoint.hugging_face.layouts import LayoutTensor
from illada_megatron.checkpoint.state import Held, held_parameters


@torch.no_grad()
def load_source(source: Source, chunks: Sequence[nn.Module]) -> None:
    """Fill this rank's chunks. Rows that pad the vocabulary are 0. Raises CheckpointError where the directory is of an
    autoregressive model, OSError."""
    if source.foreign.is_autoregressive:
        raise CheckpointError(
            f"{source.directory}: an autoregressive model; what it has learnt is no denoising: import it "
            "(illada convert from-hf) and train it first"
        )
    by_parameter: dict[str, list[LayoutTensor]] = {}
    for tensor in source.tensors:
        by_parameter.setdefault(tensor.parameter, []).append(tensor)
    for item in held_parameters(chunks, source.model):
        item.tensor.zero_()
        for tensor in by_parameter[item.parameter.name]:
            _fill(source, item, tensor)


def _fill(source: Source, item: Held, tensor: LayoutTensor) -> None:
    """What `tensor` has of the rows and columns that this rank holds of a parameter."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for row, shape, offset in item.parameter.held(rank, size):
        columns = slice(offset[1], offset[1] + shape[1]) if len(shape) > 1 else ...
        for stored, first, count in _overlaps(tensor, offset[0], shape[0]):
            own = row + first - offset[0]
            for at, rows in row_blocks(0, count, math.prod(tensor.shape[1:]) * 4):
                block = source.reader.rows(tensor.name, stored + at, rows)
                if not bool(torch.isfinite(block).all()):
                    raise CheckpointError(f"{source.directory}: {tensor.name} has a value that is no number")
                item.tensor[own + at : own + at + rows] = block[:, columns] if len(shape) > 1 else block


def _overlaps(tensor: LayoutTensor, first: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Of the parameter's rows [first, first + rows): (row of the tensor, row of the parameter, how many)."""
    at = 0
    for start, count in tensor.runs:
        low, high = max(first, start), min(first + rows, start + count)
        if low < high:
            yield at + low - start, low, high - low
        at += count

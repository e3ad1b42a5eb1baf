"""A checkpoint of this program -> a directory that transformers loads. Tensor by tensor: memory does not depend on the
model."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.names import WEIGHT, tensor_name, weights_state
from illada_megatron.checkpoint.files.new_directory import staged
from illada_megatron.checkpoint.files.storage import Folder
from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.checkpoint.hugging_face.config_json import CONFIG, config_json
from illada_megatron.checkpoint.hugging_face.layouts import LAYOUTS, LayoutName, LayoutTensor, layout_tensors
from illada_megatron.checkpoint.hugging_face.model_card import CARD, CardWords, model_card
from illada_megatron.checkpoint.hugging_face.safetensors_files import NewTensor, write_file, write_safetensors
from illada_megatron.checkpoint.hugging_face.tokenizer_files import TokenizerFiles, check_fits
from illada_megatron.checkpoint.predictor import saved_config
from illada_megatron.checkpoint.store import CheckpointInfo
from illada_megatron.config.schema import Dtype
from illada_megatron.model.transformer_config import DTYPES

Progress = Callable[[int], None]
"""Called with the number of bytes that were written since the last call."""

BLOCK_BYTES = 16 << 20
"""What is read at a time (a single row may be larger)."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    """Of the weights."""
    from_main_weights: bool
    """The optimizer's fp32 weights instead of the bf16 ones that the model computes with."""


def export(
    info: CheckpointInfo,
    directory: Path,
    layout_name: LayoutName,
    dtype: Dtype = "bf16",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: TokenizerFiles | None = None,
    progress: Progress = lambda _: None,
    ema: bool = False,
    card: CardWords | None = None,
) -> Exported:
    """Write the model of a checkpoint, of any layout and precision, to `directory`, which must not exist or be empty.

    dtype: fp32 takes the optimizer's main weights where the run was in bf16 and the checkpoint has them. ema: the
    moving average of the weights takes their place. card: for README.md. The directory gets its name when all of it is
    durable. Raises CheckpointError, OSError.
    """
    layout, config = LAYOUTS[layout_name], saved_config(info)
    model = config.model
    if tokenizer is not None:
        check_fits(tokenizer.path, tokenizer.vocab_size, model.vocab_size)
    reader = TensorReader(info.path)
    tensors = layout_tensors(layout, model)
    target = DTYPES[dtype]
    state = weights_state(reader.tensors, reader.place, ema)
    main = (
        state == WEIGHT
        and dtype == "fp32"
        and all(tensor_name(tensor.parameter, "main") in reader.tensors for tensor in tensors)
    )
    values = config_json(layout, model, str(target).removeprefix("torch."), tokenizer.special_ids if tokenizer else {})

    with staged(directory, export_bytes(info, layout_name, dtype), may_be_empty=True) as temporary:
        place = LocalFolder(temporary)
        _write_json(place, CONFIG, values)
        _write_json(place, "generation_config.json", _generation_config(values))
        for name in layout.files:
            source = files("illada_megatron.checkpoint.hugging_face") / name
            write_file(place, name, source.read_bytes())
        if tokenizer is not None:
            tokenizer.write(place)
        write_file(place, CARD, model_card(directory.absolute().name, info, config, layout, dtype, card or CardWords()))
        kept = "main" if main else state
        blocks = (block for tensor in tensors for block in _blocks(reader, tensor, kept, target, progress))
        new = [NewTensor(tensor.name, tensor.shape) for tensor in tensors]
        write_safetensors(place, new, target, max_shard_bytes, blocks)
        written = tuple(sorted(path.name for path in temporary.iterdir()))
    return Exported(directory, written, len(tensors), export_bytes(info, layout_name, dtype), main)


def export_bytes(info: CheckpointInfo, layout_name: LayoutName, dtype: Dtype) -> int:
    """Of all weights: the total of `Progress`."""
    tensors = layout_tensors(LAYOUTS[layout_name], saved_config(info).model)
    return sum(math.prod(tensor.shape) for tensor in tensors) * DTYPES[dtype].itemsize


def row_blocks(first: int, rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of at most BLOCK_BYTES, at least a row."""
    count = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(first, first + rows, count):
        yield start, min(count, first + rows - start)


def _blocks(
    reader: TensorReader, tensor: LayoutTensor, state: str, dtype: torch.dtype, progress: Progress
) -> Iterator[Tensor]:
    name, rest = tensor_name(tensor.parameter, state), tensor.shape[1:]
    zeros = (0,) * len(rest)
    for first, rows in tensor.runs:
        for start, count in row_blocks(first, rows, math.prod(rest) * 4):
            block = reader.read(name, (start, *zeros), (count, *rest)).to(dtype)
            yield block
            progress(block.nbytes)


def _generation_config(values: dict[str, Any]) -> dict[str, Any]:
    """Ids for samplers; all else about sampling is theirs."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    return {key: values[key] for key in keys}


def _write_json(place: Folder, name: str, values: dict[str, Any]) -> None:
    write_file(place, name, json.dumps(values, indent=2).encode() + b"\n")

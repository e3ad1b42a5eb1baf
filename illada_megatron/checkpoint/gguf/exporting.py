"""A checkpoint of this program -> one GGUF file that llama.cpp runs. Block by block: memory does not depend on the
model."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.names import WEIGHT, tensor_name, weights_state
from illada_megatron.checkpoint.files.new_directory import made
from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.checkpoint.gguf.architecture import (
    ARCHITECTURE,
    NAMES,
    add_architecture,
    check_architecture,
    interleaved,
    is_turned,
)
from illada_megatron.checkpoint.gguf.vocabulary import Vocabulary, add_vocabulary
from illada_megatron.checkpoint.hugging_face.exporting import Progress, row_blocks
from illada_megatron.checkpoint.hugging_face.layouts import LayoutTensor, layout_tensors
from illada_megatron.checkpoint.hugging_face.safetensors_files import bytes_of
from illada_megatron.checkpoint.hugging_face.tokenizer_files import check_fits
from illada_megatron.checkpoint.predictor import saved_config
from illada_megatron.checkpoint.store import CheckpointInfo
from illada_megatron.config import ModelConfig
from illada_megatron.system.whole_file import replaced

GgufDtype = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names in gguf's GGMLQuantizationType."""
_FILE_TYPES = {"fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "fp16": "MOSTLY_F16"}


@dataclass(frozen=True)
class ExportedGguf:
    """What was written."""

    path: Path
    tensors: int
    nbytes: int
    """Of the weights."""
    from_main_weights: bool
    """The optimizer's fp32 weights instead of the bf16 ones that the model computes with."""


def export_gguf(
    info: CheckpointInfo,
    path: Path,
    dtype: GgufDtype = "bf16",
    words: Vocabulary | None = None,
    progress: Progress = lambda _: None,
    ema: bool = False,
) -> ExportedGguf:
    """Write the model of a checkpoint, of any layout and precision, to the file `path`, which must not exist.

    dtype: of matrices; norms and biases are fp32, as llama.cpp has them. fp32 and fp16 take the optimizer's main
    weights where the run was in bf16 and the checkpoint has them. words: the tokenizer; None: the file knows ids alone.
    ema: the moving average of the weights takes their place. The file gets its name when all of it is durable. Raises
    CheckpointError, DataError, OSError.
    """
    check_gguf()
    model = saved_config(info).model
    check_architecture(model)
    if words is not None:
        check_fits(words.path, words.vocab_size, model.vocab_size)
    reader = TensorReader(info.path)
    tensors = layout_tensors(NAMES, model)
    state = weights_state(reader.tensors, reader.place, ema)
    main = (
        state == WEIGHT
        and dtype != "bf16"
        and all(tensor_name(tensor.parameter, "main") in reader.tensors for tensor in tensors)
    )
    nbytes = gguf_bytes(info, dtype)
    _check_target(path)
    with made(path.parent):
        _check_room(path.parent, nbytes)
        with replaced(path, _as_new) as file:
            ends = _write_head(Path(file.name), model, tensors, dtype, words)
            file.seek(0, 2)
            for tensor, (begin, end) in zip(tensors, pairwise(ends), strict=True):
                file.write(bytes(begin - file.tell()))
                for block in _blocks(reader, tensor, "main" if main else state, _dtype(tensor, dtype), model):
                    file.write(bytes_of(block))
                    progress(block.nbytes)
                _check_end(file, tensor, begin, end)
            file.write(bytes(ends[-1] - file.tell()))
    return ExportedGguf(path, len(tensors), nbytes, main)


def check_gguf() -> None:
    """Raises CheckpointError without the package gguf."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise CheckpointError("to-gguf writes with the package gguf: pip install 'illada-megatron[gguf]'") from error


def gguf_bytes(info: CheckpointInfo, dtype: GgufDtype) -> int:
    """Of all weights: the total of `Progress`."""
    return sum(_nbytes(tensor, dtype) for tensor in layout_tensors(NAMES, saved_config(info).model))


def _dtype(tensor: LayoutTensor, dtype: GgufDtype) -> torch.dtype:
    return _DTYPES[dtype] if len(tensor.shape) > 1 else torch.float32


def _nbytes(tensor: LayoutTensor, dtype: GgufDtype) -> int:
    return math.prod(tensor.shape) * _dtype(tensor, dtype).itemsize


def _check_target(path: Path) -> None:
    """llama.cpp asks for the ending."""
    if path.parts[:1] == ("s3:",):
        raise CheckpointError(f"{path}: is written on this machine's disks only: name a file, and upload it")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: ends in {path.suffix!r}, expected the name of a file that ends in .gguf")
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path}: exists, and is not replaced: name a new file, or remove it first")


def _check_room(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise CheckpointError(f"{directory}: has room for {free:,} bytes, {nbytes:,} are to be written")


def _as_new(temporary: Path, path: Path) -> None:
    """Not in the place of what another has written meanwhile."""
    _check_target(path)
    temporary.rename(path)


def _write_head(
    path: Path, model: ModelConfig, tensors: list[LayoutTensor], dtype: GgufDtype, words: Vocabulary | None
) -> list[int]:
    """All before the weights. Returns where each tensor begins in the file, and where the last one's padding ends."""
    import gguf

    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    add_architecture(writer, model)
    add_vocabulary(writer, words, model.vocab_size, model.mask_token_id)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[_TYPES[_dtype(tensor, dtype)]]
        # numpy has no bf16: the type that counts is the last
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _nbytes(tensor, dtype), kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    align = writer.data_alignment
    begins = [-(-path.stat().st_size // align) * align]
    for tensor in tensors:
        begins.append(begins[-1] + writer.ggml_pad(_nbytes(tensor, dtype), align))
    return begins


def _blocks(
    reader: TensorReader, tensor: LayoutTensor, state: str, dtype: torch.dtype, model: ModelConfig
) -> Iterator[Tensor]:
    """A tensor's rows, in llama.cpp's order. Raises CheckpointError where one does not fit the type."""
    name, rest = tensor_name(tensor.parameter, state), tensor.shape[1:]
    zeros = (0,) * len(rest)
    together = model.head_dim if is_turned(tensor.name) else 1
    for first, rows in tensor.runs:
        for start, count in row_blocks(0, rows // together, together * math.prod(rest) * 4):
            block = reader.read(name, (first + start * together, *zeros), (count * together, *rest))
            if together > 1:
                block = interleaved(block, together)
            converted = block.to(dtype).contiguous()
            if dtype == torch.float16 and not bool(converted.isfinite().all()):
                raise CheckpointError(
                    f"{tensor.parameter}: has a value of {block.float().abs().max():.3g}, fp16 ends at 65504: take "
                    "--dtype bf16"
                )
            yield converted


def _check_end(file: BinaryIO, tensor: LayoutTensor, begin: int, end: int) -> None:
    """Raises ValueError where the head says something else than was written."""
    if not begin < file.tell() <= end:
        raise ValueError(f"{tensor.name}: ends at {file.tell()}, expected more than {begin} and at most {end}")

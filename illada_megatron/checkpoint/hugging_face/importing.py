"""A directory in a Hugging Face layout -> weights that a run begins with. Tensor by tensor: memory does not depend on
the model.

Read are the layouts of iLLaDA and LLaDA, and plain Llama, Qwen2 and Qwen3 models, autoregressive ones: they get a mask
token. No code of the directory is run.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illada_megatron.checkpoint import store
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.new_directory import made
from illada_megatron.checkpoint.files.storage import Folder, folder
from illada_megatron.checkpoint.files.tensors import TensorWriter, write_metadata
from illada_megatron.checkpoint.hugging_face.config_json import CONFIG, ForeignModel, model_config, read_config_json
from illada_megatron.checkpoint.hugging_face.exporting import row_blocks
from illada_megatron.checkpoint.hugging_face.layouts import LayoutTensor, layout_tensors
from illada_megatron.checkpoint.hugging_face.safetensors_files import SafetensorsReader
from illada_megatron.checkpoint.hugging_face.tokenizer_files import check_fits
from illada_megatron.config import ModelConfig, RunConfig, load_config
from illada_megatron.config.parameters import EMBEDDING, HEAD, parameters
from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.finding import NAMES, find_tokenizer
from illada_megatron.data.tokenizers.fitting import check_mask, unused_rows
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from illada_megatron.model.transformer_config import DTYPES

# Of ModelConfig, what a run may choose for weights that it is given.
_FREE = (
    *("make_vocab_size_divisible_by", "max_sequence_length"),
    *("init_method", "init_method_std", "embedding_init_std"),
)
# Buffers that old checkpoints carry.
_IGNORED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Source:
    """A directory that can be read as a model of this program."""

    directory: Path
    foreign: ForeignModel
    reader: SafetensorsReader
    model: ModelConfig
    """As it is going to be here."""
    config: RunConfig
    """Of the runs that begin with it."""
    tensors: tuple[LayoutTensor, ...]
    """All that are read; where the head has to be made from a tied embedding, the embedding's tensor twice."""
    new_mask_row: bool
    """The mask is a row more than the directory has."""
    words: Tokenizer | None = None
    """Of the runs to come, where it is on this machine; its ids and its mask go with the model."""

    @property
    def vocab_size(self) -> int:
        """Rows of the directory's embedding."""
        return self.model.vocab_size - self.new_mask_row

    @property
    def nbytes(self) -> int:
        """The total of the progress."""
        stored = (self.reader.tensors[tensor.name] for tensor in self.tensors)
        return sum(math.prod(one.shape) * one.dtype.itemsize for one in stored)


def open_source(
    directory: Path,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    mask_token_id: int | None = None,
) -> Source:
    """What is in a directory, checked: config.json, the names and shapes of all tensors, no bias beside
    those of queries, keys and values.

    config, overrides: of the runs that begin with these weights, as for training; the model is the directory's.
    mask_token_id: where the directory does not say it; None: the released model's, for an autoregressive model its
    tokenizer's mask, or else a new row behind its vocabulary. Raises CheckpointError, ConfigError, DataError.
    """
    foreign, reader = read_config_json(directory), SafetensorsReader(directory)
    mask, new_row = _mask(directory, foreign, mask_token_id)
    vocab_size = foreign.fields["vocab_size"]
    fields = {**foreign.fields, "mask_token_id": mask, "vocab_size": vocab_size + new_row}
    native = model_config(directory / CONFIG, foreign.layout, fields)
    resolved = _run_config(directory, native, reader, config, overrides)
    words = _tokenizer(resolved)
    if words is not None and words.mask_id not in (None, mask):
        if foreign.is_autoregressive and mask_token_id is None and "mask_token_id" not in foreign.fields:
            return open_source(directory, config, overrides, words.mask_id)
        raise CheckpointError(
            f"{resolved.data.tokenizer_path}: reserves id {words.mask_id} for the mask, the model's mask is {mask}: "
            f"name the model's own tokenizer in data.tokenizer_path, or give --mask-token-id {words.mask_id}"
        )
    if words is not None and foreign.is_autoregressive:  # else it was trained so
        check_mask(words, resolved.data.tokenizer_path or "", mask)
    tensors = layout_tensors(foreign.layout, native, vocab_size)
    _check_tensors(reader, tensors, native.tie_word_embeddings, foreign)
    if native.tie_word_embeddings and not resolved.model.tie_word_embeddings:
        (embedding,) = [tensor for tensor in tensors if tensor.parameter == EMBEDDING]
        tensors.append(replace(embedding, parameter=HEAD))
    return Source(directory, foreign, reader, resolved.model, resolved, tuple(tensors), new_row, words)


def import_weights(source: Source, save_dir: str | Path, progress: Callable[[int], None] = lambda _: None) -> Folder:
    """Write the weights below `save_dir` (also `s3://`), where no checkpoint may be yet, as a checkpoint of step 0 that
    runs begin with. Returns its folder. Raises CheckpointError, OSError."""
    place = folder(save_dir)
    store.check_name(place)
    path = store.step_directory(place, 0)
    for other in store.checkpoints_newest_first(place):
        if other.name != path.name or other.size(store.RECORD) is not None:  # not what an interrupted import left
            raise CheckpointError(f"{place}: has checkpoints already ({other.name}): give another directory")
    path.clear()
    with made(place.path) if isinstance(place, LocalFolder) else nullcontext():
        try:
            path.make()
            _write(source, path, progress)
        except BaseException:
            path.clear()
            raise
    return path


def _write(source: Source, path: Folder, progress: Callable[[int], None]) -> None:
    writer = TensorWriter(path)
    try:
        shapes = {parameter.name: parameter.shape for parameter in parameters(source.model)}
        for tensor in source.tensors:
            _write_tensor(source, tensor, shapes[tensor.parameter], writer, progress)
        written = write_metadata(path, [writer.close()])
    except BaseException:
        writer.abandon()
        raise
    store.finish(path, 0, source.config.model_dump(mode="json"), None, written)
    store.move_pointer(path)


def _mask(directory: Path, foreign: ForeignModel, wanted: int | None) -> tuple[int, bool]:
    """(id of the mask, whether it is a new row)."""
    vocab_size, said = foreign.fields["vocab_size"], foreign.fields.get("mask_token_id")
    if said is not None and wanted not in (None, said):
        raise CheckpointError(
            f"{directory / CONFIG}: mask_token_id is {said}, --mask-token-id is {wanted}: leave it out"
        )
    if foreign.is_autoregressive and said is None:
        mask = vocab_size if wanted is None else wanted
        if not 0 <= mask <= vocab_size:
            raise CheckpointError(
                f"{directory}: --mask-token-id is {mask}, expected an id below the {vocab_size} rows of the embedding "
                f"that no text uses, or {vocab_size} for a new row"
            )
        return mask, mask == vocab_size
    mask = next(one for one in (said, wanted, foreign.layout.default_mask_token_id) if one is not None)
    if not 0 <= mask < vocab_size:
        raise CheckpointError(
            f"{directory}: the mask is {mask}, the embedding has {vocab_size} rows: give the right --mask-token-id"
        )
    return mask, False


def _run_config(
    directory: Path, native: ModelConfig, reader: SafetensorsReader, config: str | Path | None, overrides: Sequence[str]
) -> RunConfig:
    model = native.model_dump(exclude=None if config is None else set(_FREE))
    given = [f"model.{field}={json.dumps(value)}" for field, value in model.items()]
    if config is None:
        dtypes = {stored.dtype for stored in reader.tensors.values()}
        length = min(RunConfig().data.sequence_length, native.max_sequence_length)
        given += [f"training.precision={'bf16' if dtypes == {torch.bfloat16} else 'fp32'}"]
        given += [f"data.sequence_length={length}"]
    resolved = load_config(config, [*given, *overrides])
    tokenizer = next((path for name in NAMES if (path := directory / name).is_file()), None)
    if resolved.data.tokenizer_path is None and tokenizer is not None:
        resolved = load_config(config, [*given, *overrides, f"data.tokenizer_path={tokenizer.resolve()}"])
    different = [
        f"model.{field} is {value} in the configuration, {wanted} in the directory"
        for field, wanted in native
        if (value := getattr(resolved.model, field)) != wanted
        and field not in _FREE
        and not (field == "tie_word_embeddings" and wanted)  # a tied head can be untied
    ]
    if different:
        raise CheckpointError(f"{directory}: weights of another model:\n  " + "\n  ".join(different))
    return resolved


def _tokenizer(config: RunConfig) -> Tokenizer | None:
    """None: it is not on this machine; the runs to come may be on another."""
    name = config.data.tokenizer_path
    if name is None:
        return None
    try:
        path = find_tokenizer(name)
    except DataError:
        if Path(name).exists():
            raise
        return None
    words = load_tokenizer(path)
    check_fits(path, words.vocab_size, config.model.vocab_size)
    return words


def _check_tensors(
    reader: SafetensorsReader, tensors: Sequence[LayoutTensor], tied: bool, foreign: ForeignModel
) -> None:
    expected = {tensor.name: tensor.shape for tensor in tensors}
    for name, shape in expected.items():
        stored = reader.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{reader.directory}: has no tensor {name}, expected one of shape {shape}")
        if stored.shape != shape:
            raise CheckpointError(
                f"{reader.directory / stored.file}: {name} has shape {stored.shape}, {CONFIG} makes it {shape}"
            )
    for name in reader.tensors.keys() - expected.keys():
        if name.endswith(_IGNORED):
            continue
        if name == foreign.layout.outside[HEAD] and tied:
            _check_same(reader, name, foreign.layout.outside[EMBEDDING])
        elif name.endswith(".bias"):
            _check_zero(reader, name)
        else:
            raise CheckpointError(f"{reader.directory}: has a tensor {name}, which this model does not know")


def _check_same(reader: SafetensorsReader, name: str, other: str) -> None:
    one, two = reader.tensors[name], reader.tensors[other]
    same = one.shape == two.shape and all(
        torch.equal(reader.rows(name, *block), reader.rows(other, *block)) for block in _all_rows(one.shape)
    )
    if not same:
        raise CheckpointError(f"{reader.directory}: {CONFIG} ties {name} to {other}, but they differ")


def _check_zero(reader: SafetensorsReader, name: str) -> None:
    shape = reader.tensors[name].shape
    if any(reader.rows(name, *block).any() for block in _all_rows(shape)):
        raise CheckpointError(
            f"{reader.directory}: {name} is not zero; the model here has biases at queries, keys and values alone, "
            f"where {CONFIG} says so, and without this one the weights would be those of another model"
        )


def _all_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return row_blocks(0, shape[0] if shape else 1, math.prod(shape[1:]) * 4)


def _write_tensor(
    source: Source,
    tensor: LayoutTensor,
    whole_shape: tuple[int, ...],
    writer: TensorWriter,
    progress: Callable[[int], None],
) -> None:
    """A tensor's rows to their places in the parameter. Behind the vocabulary: the mask's new row, then zeros, as
    initial weights have them."""
    dtype, rest = DTYPES[source.config.training.precision], tensor.shape[1:]
    is_vocabulary = tensor.parameter in (EMBEDDING, HEAD)
    row, total = 0, torch.zeros(rest, dtype=torch.float64)

    def write(block: Tensor, at: int) -> None:
        writer.write(tensor.parameter, block, (at, *(0,) * len(rest)), whole_shape)

    for first, rows in tensor.runs:
        for at, count in row_blocks(first, rows, math.prod(rest) * 4):
            block = source.reader.rows(tensor.name, row, count)
            _check_finite(source, tensor.name, block, row)
            if is_vocabulary and source.new_mask_row:
                total += block.sum(0, dtype=torch.float64)
            write(block.to(dtype), at)
            row += count
            progress(block.nbytes)
    if not is_vocabulary:
        return
    if source.new_mask_row:
        write((total / row).to(dtype)[None], row)
        row += 1
    for at, count in row_blocks(row, whole_shape[0] - row, math.prod(rest) * 4):
        write(torch.zeros((count, *rest), dtype=dtype), at)


def _check_finite(source: Source, name: str, block: Tensor, row: int) -> None:
    if not bool(torch.isfinite(block).all()):
        bad = row + int((~torch.isfinite(block.flatten(1) if block.dim() > 1 else block[:, None])).any(1).nonzero()[0])
        raise CheckpointError(f"{source.directory}: {name} has a value that is no number in row {bad}")


def described(source: Source) -> list[tuple[str, str]]:
    """What was found and decided, as rows of a table."""
    model, foreign = source.model, source.foreign
    mask = f"{model.mask_token_id}" + (": a new row, the mean of the others" if source.new_mask_row else "")
    kind: dict[str, Any] = {"layout": f"{foreign.model_type}{', autoregressive' if foreign.is_autoregressive else ''}"}
    kind["mask token"] = mask
    kind["embeddings"] = "tied" if model.tie_word_embeddings else "untied"
    kind["precision"] = source.config.training.precision
    kind["tokenizer"] = source.config.data.tokenizer_path or "none found"
    if (words := source.words) is None:
        kind["tokenizer"] += (
            ", not on this machine: not compared with the model" if source.config.data.tokenizer_path else ""
        )
    else:
        kind["tokenizer's ids"] = f"{words.vocab_size:,}, the model's {model.vocab_size:,}"
        if words.mask_id is None:
            kind["tokenizer's mask"] = "none, and none is needed: the model's mask is no id of text"
        if unused := unused_rows(words, source.config.data.tokenizer_path or "", model.vocab_size):
            kind["warning"] = unused
    return list(kind.items())

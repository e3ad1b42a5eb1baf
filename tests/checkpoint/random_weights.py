"""Checkpoints of random weights, for tests of conversions: quick to make, every value of its own."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illada_megatron.checkpoint import store
from illada_megatron.checkpoint.files.names import tensor_name
from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.files.tensors import TensorWriter, write_metadata
from illada_megatron.config import RunConfig, load_config
from illada_megatron.config.parameters import EMBEDDING, HEAD, parameters
from illada_megatron.generation.model import Part
from illada_megatron.generation.opening import open_stage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

SHAPE = (
    *("model.num_layers=3", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=250", "model.max_sequence_length=64", "data.sequence_length=32"),
    *("runtime.device=cpu", "runtime.num_threads=1", "training.precision=fp32"),
)


def small_config(*overrides: str) -> RunConfig:
    """Grouped queries, a padded vocabulary (250 -> 256), tied embeddings."""
    return load_config(None, [*SHAPE, *overrides])


def random_checkpoint(
    save_dir: Path, config: RunConfig, main: bool = False, step: int = 7, piece_bytes: int = 2000
) -> dict[str, Tensor]:
    """Write a checkpoint of a run of `config` at `step`; main: with fp32 main weights, as a run in bf16 has them.
    Returns the weights (the main weights where there are some), with rows of zeros behind the vocabulary."""
    place = folder(save_dir)
    path = store.step_directory(place, step)
    path.make()
    writer, generator = TensorWriter(path, piece_bytes=piece_bytes), torch.Generator().manual_seed(0)
    weights = {}
    for parameter in parameters(config.model):
        weight = torch.randn(parameter.shape, generator=generator) * 0.2 + (len(parameter.shape) == 1)
        if parameter.name in (EMBEDDING, HEAD):
            weight[config.model.vocab_size :] = 0
        if main:
            writer.write(tensor_name(parameter.name, "main"), weight)
        else:
            weight = weight.to(DTYPES[config.training.precision])
        writer.write(parameter.name, weight.to(DTYPES[config.training.precision]))
        weights[parameter.name] = weight
    files = write_metadata(path, [writer.close()])
    store.finish(path, step, config.model_dump(mode="json"), {"step": step}, files)
    store.move_pointer(path)
    return weights


def logits_of(path: Path, tokens: Tensor) -> Tensor:
    """What the newest checkpoint below `path` makes of tokens [b, s]: [b, s, vocab_size]."""
    with open_stage(path, "cpu") as opened:
        from illada_megatron.generation.layers import LayerModel

        every = torch.arange(tokens.shape[1])
        found = LayerModel(opened.stage, opened.config, opened.run).logits([Part(row, every) for row in tokens])
    return found.view(*tokens.shape, -1)


def change_config(directory: Path, **changes: Any) -> None:
    """Other values of a Hugging Face directory's config.json; "left out": without the key."""
    file = directory / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "left out"}))

"""What delayed scaling in FP8 goes on from: the factor and the last largest values of every tensor that is quantised.

Transformer Engine keeps them with each linear layer, and would save them as an `_extra_state` of pickled bytes. Here
they are tensors under the layer's canonical name. They say nothing of the layout: largest values are reduced over
tensor and data parallel ranks, so all ranks of a pipeline stage hold the same.

A run that finds none in its checkpoint (it was trained in bf16, or with another recipe) begins as a new one does, with
factors of 1 until the first products have been seen; one that needs none leaves them unread.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_recipe
from torch import Tensor, nn

from illada_megatron.checkpoint.files.names import FP8, tensor_name
from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import canonical_name

# Transformer Engine's name of the quantisers of inputs, weights and outputs, and of gradients -> ours
_DIRECTIONS = {"scaling_fwd": "fwd", "scaling_bwd": "bwd"}
_WEIGHT = ".weight"


def tensors_to_save(chunks: Sequence[nn.Module], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, a copy) of what this rank has to write: of each stage the first tensor and data parallel rank does. The
    next forward pass changes them, long before the optimizer's step."""
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    if any(ranks):
        return
    for name, module in _linear_layers(chunks, model):
        for key, direction in _DIRECTIONS.items():
            state = module.fp8_meta.get(key)
            if hasattr(state, "amax_history"):
                yield tensor_name(name, f"{FP8}scale_{direction}"), state.scale.detach().clone()
                yield tensor_name(name, f"{FP8}amax_history_{direction}"), state.amax_history.detach().clone()


def load(reader: TensorReader, chunks: Sequence[nn.Module], model: ModelConfig) -> None:
    """Take up what a checkpoint has of it, where this run scales so. Of a history of another length the steps that
    both have, newest first, are taken."""
    core = chunks[0].config if chunks else None
    if core is None or core.fp8 is None or core.fp8_recipe != Fp8Recipe.delayed:  # type: ignore[union-attr]
        return
    recipe = get_fp8_recipe(core)
    for name, module in _linear_layers(chunks, model):
        for key, direction in _DIRECTIONS.items():
            factors = tensor_name(name, f"{FP8}scale_{direction}")
            if factors not in reader.tensors:
                continue
            _prepare(module, recipe)
            state = module.fp8_meta[key]
            history = tensor_name(name, f"{FP8}amax_history_{direction}")
            rows = min(len(state.amax_history), reader.tensors[history].shape[0])
            state.scale.copy_(reader.read(factors))
            state.amax_history[:rows].copy_(reader.read(history, (0, 0), (rows, state.amax_history.shape[1])))


def _prepare(module: Any, recipe: Any) -> None:
    """Before its first forward pass a layer has no place for them (Transformer Engine's `set_extra_state` likewise)."""
    module.fp8_meta.setdefault("num_gemms", 1)
    module.fp8_meta["recipe"] = recipe
    module.init_fp8_meta_tensors(recipe)


def _linear_layers(chunks: Sequence[nn.Module], model: ModelConfig) -> Iterator[tuple[str, Any]]:
    """(canonical name, Transformer Engine's module) of the layers with a weight; attention stays bf16."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if hasattr(module, "fp8_meta") and isinstance(getattr(module, "weight", None), torch.Tensor):
                whole = canonical_name(f"{name}{_WEIGHT}", chunk.layer_offset, model.tie_word_embeddings)  # type: ignore[arg-type]
                yield whole.removesuffix(_WEIGHT), module

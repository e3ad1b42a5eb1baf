"""What delayed scaling in FP8 goes on from: the factor and the last largest values of every tensor that is quantised.

Transformer Engine keeps them with each linear layer, and would save them as an `_extra_state` of pickled bytes. Here
they are tensors under the layer's canonical name. They say nothing of the layout: largest values are reduced over
tensor and data parallel ranks, so all ranks of a pipeline stage hold the same.

A run that finds none in its checkpoint (it was trained in bf16, or with another recipe) begins as a new one does, with
factors of 1 until the first products have been seen, also where it has gone back in place and has state of its own; one
that needs none leaves them unread.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Scaling:
    """What Transformer Engine keeps for one direction of a linear layer, as live tensors."""

    layer: str
    """Its canonical name."""
    direction: str
    """fwd: of input, weight and output; bwd: of the gradients of output and input."""
    scale: Tensor
    """[n] fp32, the factors."""
    amax_history: Tensor
    """[passes, n] fp32, largest values: of the pass under way first, then of the earlier ones, the newest last."""

    def names(self) -> tuple[str, str]:
        """In a checkpoint."""
        factors, history = (f"{FP8}{one}_{self.direction}" for one in ("scale", "amax_history"))
        return tensor_name(self.layer, factors), tensor_name(self.layer, history)

    def begin_anew(self) -> None:
        """As in a layer that has seen nothing."""
        self.scale.fill_(1.0)
        self.amax_history.zero_()


def linear_layers(chunks: Sequence[nn.Module], tied: bool) -> Iterator[tuple[str, Any]]:
    """(canonical name, Transformer Engine's module) of the layers with a weight that it can quantise; attention stays
    bf16. Chunks may be in megatron-core's DDP; tied: model.tie_word_embeddings."""
    for chunk in chunks:
        inner: Any = getattr(chunk, "module", chunk)
        for name, module in inner.named_modules():
            if hasattr(module, "fp8_meta") and isinstance(getattr(module, "weight", None), Tensor):
                yield canonical_name(f"{name}{_WEIGHT}", inner.layer_offset, tied).removesuffix(_WEIGHT), module


def scalings(chunks: Sequence[nn.Module], tied: bool) -> Iterator[Scaling]:
    """Of the layers that have been through a forward pass; none with other recipes than delayed scaling."""
    for name, module in linear_layers(chunks, tied):
        for key, direction in _DIRECTIONS.items():
            state = module.fp8_meta.get(key)
            if hasattr(state, "amax_history"):
                yield Scaling(name, direction, state.scale, state.amax_history)


def tensors_to_save(chunks: Sequence[nn.Module], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, a copy) of what this rank has to write: of each stage the first tensor and data parallel rank does. The
    next forward pass changes them, long before the optimizer's step."""
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    if any(ranks):
        return
    for one in scalings(chunks, model.tie_word_embeddings):
        for name, tensor in zip(one.names(), (one.scale, one.amax_history), strict=True):
            yield name, tensor.detach().clone()


def load(reader: TensorReader, chunks: Sequence[nn.Module], model: ModelConfig) -> None:
    """Take up what a checkpoint has of it, where this run scales so; layers of which it has none begin anew."""
    core = chunks[0].config if chunks else None
    if core is None or core.fp8 is None or core.fp8_recipe != Fp8Recipe.delayed:  # type: ignore[union-attr]
        return
    recipe, tied = get_fp8_recipe(core), model.tie_word_embeddings
    for name, module in linear_layers(chunks, tied):
        if any(tensor_name(name, f"{FP8}scale_{direction}") in reader.tensors for direction in _DIRECTIONS.values()):
            _prepare(module, recipe)
    for one in scalings(chunks, tied):
        one.begin_anew()
        factors, history = one.names()
        if factors in reader.tensors:
            one.scale.copy_(reader.read(factors))
            take_history(reader, history, one.amax_history)


def take_history(reader: TensorReader, name: str, history: Tensor) -> None:
    """Of one of another length the newest passes that both have room for."""
    saved, (own, count) = reader.tensors[name].shape[0], history.shape
    history[0].copy_(reader.read(name, (0, 0), (1, count))[0])
    if (passes := min(saved, own) - 1) > 0:
        history[-passes:].copy_(reader.read(name, (saved - passes, 0), (passes, count)))


def _prepare(module: Any, recipe: Any) -> None:
    """Before its first forward pass a layer has no place for them (Transformer Engine's `set_extra_state` likewise)."""
    module.fp8_meta.setdefault("num_gemms", 1)
    module.fp8_meta["recipe"] = recipe
    module.init_fp8_meta_tensors(recipe)

"""Initial weights as a function of (seed, canonical name): every layout starts from the same model.

Row i of a weight matrix [out, in], in the numbering of the whole unsharded matrix, is drawn from a Philox stream of
its own, keyed by the seed and the name, at counter i. A rank draws the rows it holds and keeps its columns of them.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import torch
from megatron.core import parallel_state

from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import EMBEDDING, HEAD, canonical_name, layer_of
from illada_megatron.model.mask_predictor import MaskPredictor


@torch.no_grad()
def fill_initial_weights(chunks: Sequence[MaskPredictor], model: ModelConfig, seed: int) -> None:
    """Fill the parameters of this rank's chunks in place (stds: see ModelConfig; norm weights are 1, biases 0).

    Rows that pad the vocabulary are 0: no token reads them and the loss never sees them.
    """
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            full_name = canonical_name(name, chunk.layer_offset, model.tie_word_embeddings)
            draw = _truncated_normal if model.init_method == "mitchell" else _normal
            values = _sharded_rows(draw, seed, full_name, parameter.shape, rank, size)
            values *= _std(full_name, model)
            if full_name in (EMBEDDING, HEAD):
                values[max(0, model.vocab_size - rank * len(values)) :] = 0.0
            _set(parameter, torch.from_numpy(values))


def _set(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Where weights are kept in FP8 (fp8.param_gather), the main weight begins at what Transformer Engine has kept of
    them in bf16, so that a run begins as in bf16."""
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter.get_high_precision_init_val().copy_(values)
        values = values.to(parameter.device, parameter.dtype)
    parameter.copy_(values)


_Draw = Callable[[np.random.Generator, int], np.ndarray]
"""(generator, n) -> n values."""
_CUT_OFF = 3.0


def _normal(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.standard_normal(count, dtype=np.float32)


def _truncated_normal(generator: np.random.Generator, count: int) -> np.ndarray:
    """Standard normal values between -3 and 3, by the inverse of the normal distribution's function."""
    outside = NormalDist().cdf(-_CUT_OFF)
    inside = outside + generator.random(count) * (1.0 - 2.0 * outside)
    return torch.special.ndtri(torch.from_numpy(inside)).numpy()


def _sharded_rows(draw: _Draw, seed: int, name: str, shape: torch.Size, rank: int, size: int) -> np.ndarray:
    """Tensor-parallel rank `rank` of `size`'s part, of `shape`, of a matrix of drawn values (float32)."""
    rows, columns = shape
    if _is_row_parallel(name):  # the input is sharded: whole rows, part of their columns
        held, width, kept = np.arange(rows), columns * size, slice(rank * columns, (rank + 1) * columns)
    elif name.endswith("linear_fc1.weight"):  # a rank holds its part of the gate, then its part of the up projection
        half = rows // 2
        gate = np.arange(rank * half, (rank + 1) * half)
        held, width, kept = np.concatenate([gate, gate + half * size]), columns, slice(None)
    else:
        held, width, kept = np.arange(rank * rows, (rank + 1) * rows), columns, slice(None)
    key = np.frombuffer(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), dtype=np.uint64)
    values = np.empty((rows, columns), dtype=np.float32)
    for index, row in enumerate(held):
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, int(row), 0, 0]))
        values[index] = draw(generator, width)[kept]
    return values


def _is_row_parallel(name: str) -> bool:
    return name.endswith(("linear_proj.weight", "linear_fc2.weight"))


def _std(name: str, model: ModelConfig) -> float:
    if model.init_method == "mitchell":
        return _mitchell_std(name, model)
    if name == EMBEDDING:
        return model.embedding_init_std or math.sqrt(1 / (2 * model.hidden_size))
    return model.init_method_std / (math.sqrt(2 * model.num_layers) if _is_row_parallel(name) else 1.0)


def _mitchell_std(name: str, model: ModelConfig) -> float:
    """Of the normal distribution before it is cut off."""
    if not _is_row_parallel(name):
        return 1.0 / math.sqrt(model.hidden_size)
    inputs = model.ffn_hidden_size if name.endswith("linear_fc2.weight") else model.num_attention_heads * model.head_dim
    return 1.0 / math.sqrt(2 * ((layer_of(name) or 0) + 1) * inputs)

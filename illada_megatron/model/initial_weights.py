"""Initial weights as a function of (seed, canonical name): every layout starts from the same model.

Row i of a weight matrix [out, in], in the numbering of the whole unsharded matrix, is drawn from a Philox stream of
its own, keyed by the seed and the name, at counter i. A rank draws the rows it holds and keeps its columns of them.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from megatron.core import parallel_state

from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import EMBEDDING, HEAD, canonical_name
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
            values = _sharded_normal(seed, full_name, parameter.shape, rank, size)
            values *= _std(full_name, model)
            if full_name in (EMBEDDING, HEAD):
                values[max(0, model.vocab_size - rank * len(values)) :] = 0.0
            parameter.copy_(torch.from_numpy(values))


def _sharded_normal(seed: int, name: str, shape: torch.Size, rank: int, size: int) -> np.ndarray:
    """Tensor-parallel rank `rank` of `size`'s part, of `shape`, of a matrix of standard normal values (float32)."""
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
        values[index] = generator.standard_normal(width, dtype=np.float32)[kept]
    return values


def _is_row_parallel(name: str) -> bool:
    return name.endswith(("linear_proj.weight", "linear_fc2.weight"))


def _std(name: str, model: ModelConfig) -> float:
    if name == EMBEDDING:
        return model.embedding_init_std or math.sqrt(1 / (2 * model.hidden_size))
    return model.init_method_std / (math.sqrt(2 * model.num_layers) if _is_row_parallel(name) else 1.0)

"""Megatron's legacy checkpoints (`--ckpt-format torch`): where things lie in them. No tensors here.

    directory/
      latest_checkpointed_iteration.txt     number of the newest iteration
      iter_0000100/
        mp_rank_01/model_optim_rng.pt       tensor-parallel rank 1; with pipeline stages mp_rank_01_002
        mp_rank_01/distrib_optim.pt         the distributed optimizer's state, by gradient buffer

Source: Megatron-LM's megatron/training/checkpointing.py and megatron-core's distrib_optimizer.py and
param_and_grad_buffer.py (0.12 to 0.19).
"""

import math
from collections.abc import Sequence
from pathlib import Path

from illada_megatron.checkpoint.megatron.stage_parameters import HeldParameter
from illada_megatron.config import RunConfig

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILE, DISTRIBUTED_OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"
CHECKPOINT_VERSION = 3.0
# keys of the flat tensors: main weights and moments
BUFFER_STATES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "param": "main"}
ITERATION_PREFIX = "iter_"
# megatron-core begins parameters at multiples of this in the distributed optimizer's buffers
_ALIGNMENT = 64


def iteration_directory(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return directory / f"{ITERATION_PREFIX}{iteration:07d}"


def rank_directory(tensor_rank: int, pipeline_rank: int, pipeline: int) -> str:
    """Name of the directory of a model-parallel rank."""
    return f"mp_rank_{tensor_rank:02d}" + (f"_{pipeline_rank:03d}" if pipeline > 1 else "")


def model_key(chunk: int, chunks: int) -> str:
    """Key of a model chunk's weights."""
    return f"model{chunk}" if chunks > 1 else "model"


def buffer_positions(
    held: Sequence[HeldParameter], config: RunConfig, pipeline_rank: int, chunk: int
) -> tuple[list[int], int]:
    """Where a chunk's parameters lie in distrib_optim.pt's flat tensors: (first elements, length of the tensors)."""
    parallel, first = config.parallel, pipeline_rank == chunk == 0
    limit = None  # elements after which megatron-core's DDP begins a new bucket; None: one bucket
    if parallel.overlap_grad_reduce and first:
        limit = parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * (parallel.data_parallel_size or 1))
    return positions_in_buffer(
        [math.prod(one.parameter.held_shape(parallel.tensor_model_parallel_size)) for one in held],
        [one.is_shared(config.model, parallel.pipeline_model_parallel_size) for one in held],
        limit,
    )


def positions_in_buffer(
    numels: Sequence[int], own_bucket: Sequence[bool], bucket_size: int | None
) -> tuple[list[int], int]:
    """As `buffer_positions`, for parameters of `numels` elements in the order of named_parameters().

    own_bucket: which of them DDP gives a bucket of their own (the embedding that first and last stage share). Buffers
    hold the parameters last to first, each begun at a multiple of 64, in buckets whose padding at the end is not saved.
    """
    positions = [0] * len(numels)
    bucket, within, filled = 0, 0, False  # where the bucket begins, what it has, whether it has a parameter
    for index in reversed(range(len(numels))):
        within = -(-within // _ALIGNMENT) * _ALIGNMENT
        if own_bucket[index] and filled:
            bucket, within, filled = bucket + within, 0, False
        positions[index] = bucket + within
        within, filled = within + numels[index], True
        if own_bucket[index] or (bucket_size is not None and within >= bucket_size):
            bucket, within, filled = bucket + within, 0, False
    return positions, bucket + within

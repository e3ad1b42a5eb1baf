"""Megatron's legacy checkpoints with everything but the tensors' elements, which are written into the files later."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from illada_megatron.checkpoint.megatron import legacy_layout as layout
from illada_megatron.checkpoint.megatron.args import namespace
from illada_megatron.checkpoint.megatron.stage_parameters import HeldParameter, Implementation, chunks_of_stages
from illada_megatron.config import RunConfig
from illada_megatron.config.layout import pipeline_split

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def write_skeleton(
    directory: Path,
    config: RunConfig,
    iteration: int,
    progress: dict[str, Any],
    implementation: Implementation,
    with_optimizer: bool,
) -> None:
    """Write the files of all model-parallel ranks below an iteration's `directory`, their tensors all zeros in sparse
    files. `legacy.find_slots` says where the elements belong.

    with_optimizer: also Adam's state, as megatron-core's plain or distributed optimizer (the configuration's) saves it.
    """
    parallel = config.parallel
    pipeline = parallel.pipeline_model_parallel_size
    args = namespace(config, iteration, progress["consumed_samples"], implementation)
    stages = chunks_of_stages(config.model, pipeline_split(config), implementation)
    for pipeline_rank, held in enumerate(stages):
        for rank in range(parallel.tensor_model_parallel_size):
            place = directory / layout.rank_directory(rank, pipeline_rank, pipeline)
            place.mkdir(parents=True)
            with FakeTensorMode():
                state = _model(held, config, args, iteration)
                distributed = None
                if with_optimizer:
                    state["opt_param_scheduler"] = _scheduler(config, progress["consumed_samples"])
                    state["optimizer"] = _optimizer(held, config, progress["optimizer_step"])
                    if parallel.use_distributed_optimizer:
                        distributed = _distributed(held, config, pipeline_rank)
            _save(state, place / layout.MODEL_FILE)
            if distributed is not None:
                _save(distributed, place / layout.DISTRIBUTED_OPTIMIZER_FILE)


def _save(state: dict[str, Any], file: Path) -> None:
    # the archive's own checksums would be those of the zeros
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, os.fspath(file))
    finally:
        torch.serialization.set_crc32_options(before)


def _model(held: list[list[HeldParameter]], config: RunConfig, args: Namespace, iteration: int) -> dict[str, Any]:
    tensor, dtype = config.parallel.tensor_model_parallel_size, DTYPES[config.training.precision]
    state: dict[str, Any] = {
        "args": args,
        "checkpoint_version": layout.CHECKPOINT_VERSION,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }
    for index, chunk in enumerate(held):
        state[layout.model_key(index, len(held))] = {
            one.local_name: torch.empty(one.parameter.held_shape(tensor), dtype=dtype) for one in chunk
        }
    return state


def _optimizer(held: list[list[HeldParameter]], config: RunConfig, step: int) -> dict[str, Any]:
    """As megatron-core's FP32Optimizer, Float16OptimizerWithFloat16Params or DistributedOptimizer say it; matrices and
    vectors are groups of their own (get_standard_config_overrides)."""
    tensor = config.parallel.tensor_model_parallel_size
    ordered = [one for chunk in held for one in chunk]
    groups: list[dict[str, Any]] = []
    state: dict[int, dict[str, Tensor]] = {}
    mains: list[list[Tensor]] = []
    for vectors in (False, True):
        members = [one for one in ordered if (len(one.parameter.shape) == 1) == vectors]
        identities = range(len(state), len(state) + len(members))
        for identity, one in zip(identities, members, strict=True):
            state[identity] = {moment: _fp32(one, tensor) for moment in ("exp_avg", "exp_avg_sq")}
        mains.append([_fp32(one, tensor) for one in members])
        groups.append({**_group(config, vectors, step), "params": list(identities)})
    if config.parallel.use_distributed_optimizer:
        for group in groups:
            del group["params"]
        return {"optimizer": {"param_groups": groups}}
    inner = {"state": state, "param_groups": groups}
    return inner if config.training.precision == "fp32" else {"optimizer": inner, "fp32_from_fp16_params": mains}


def _fp32(one: HeldParameter, tensor: int) -> Tensor:
    return torch.empty(one.parameter.held_shape(tensor), dtype=torch.float32)


def _group(config: RunConfig, vectors: bool, step: int) -> dict[str, Any]:
    settings, lr = config.optimizer, config.training.lr
    multiplier = 0.0 if vectors else 1.0
    return {
        "wd_mult": multiplier,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
        "max_lr": lr,
        "min_lr": config.schedule.min_lr,
        "lr": lr,
        "weight_decay": settings.weight_decay * multiplier,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_eps,
        "bias_correction": True,
        "step": step,
    }


def _distributed(held: list[list[HeldParameter]], config: RunConfig, pipeline_rank: int) -> dict[Any, Any]:
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for chunk, wanted in enumerate(held):
        _, length = layout.buffer_positions(wanted, config, pipeline_rank, chunk)
        flat: dict[str, Any] = {key: torch.empty(length, dtype=torch.float32) for key in layout.BUFFER_STATES}
        state[chunk] = {(DTYPES[config.training.precision], torch.float32): {**flat, "numel_unpadded": length}}
    return state


def _scheduler(config: RunConfig, consumed_samples: int) -> dict[str, Any]:
    """megatron-core's OptimizerParamScheduler, which counts in samples."""
    batch, schedule = config.training.global_batch_size, config.schedule
    decay = config.optimizer.weight_decay
    return {
        "max_lr": config.training.lr,
        "lr_warmup_steps": schedule.warmup_steps * batch,
        "num_steps": consumed_samples,
        "lr_decay_style": "constant",
        "lr_decay_steps": config.training.train_steps * batch,
        "min_lr": schedule.min_lr,
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": config.training.train_steps * batch,
    }

"""What megatron-core's own optimizers save is read, and they take what is written."""

import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_checkpoint import PROGRESS, STEP, random_tensors, write_checkpoint

from illada_megatron.checkpoint.megatron.args import namespace
from illada_megatron.checkpoint.tools.compare import compare
from illada_megatron.checkpoint.tools.opening import open_checkpoint
from illada_megatron.checkpoint.tools.reshard import LayoutChange, reshard
from illada_megatron.config import RunConfig, load_config
from illada_megatron.runtime import runtime

# 4 layers, grouped queries, a padded vocabulary; vectors of 32 are shorter than the buffers' alignment of 64
MODEL = (
    *("model.num_layers=4", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=250", "model.max_sequence_length=64", "data.sequence_length=32"),
    *("training.micro_batch_size=1", "training.global_batch_size=8", "runtime.device=cpu", "runtime.num_threads=1"),
)
OPTIMIZERS = {
    "plain": ("parallel.use_distributed_optimizer=false",),
    "distributed": (),
    "distributed, in buckets": ("parallel.overlap_grad_reduce=true", "parallel.ddp_bucket_size=1"),
}


class _Backend(enum.Enum):
    """As megatron.core.transformer.enums.AttnBackend, which its arguments hold."""

    auto = 5


def _megatrons_files(config: RunConfig, ours: Path, directory: Path) -> None:
    """What Megatron's save_checkpoint writes for one rank, made of megatron-core's own state dicts."""
    from illada_megatron.checkpoint.sharded import load_checkpoint
    from illada_megatron.model import build_model_chunks
    from illada_megatron.training.gradient_reduction import wrap_data_parallel
    from illada_megatron.training.optimizer import build_optimizer

    with runtime(config) as run:
        chunks = wrap_data_parallel(config.parallel, build_model_chunks(config, run.device))
        optimizer = build_optimizer(config, chunks)
        load_checkpoint(open_checkpoint(str(ours)).info, config, chunks, optimizer)
        _save_as_megatron(config, chunks, optimizer, directory)


def _save_as_megatron(config: RunConfig, chunks: list[Any], optimizer: Any, directory: Path) -> None:
    """Megatron's save_checkpoint, of one rank."""
    from illada_megatron.checkpoint.state import optimizers

    args = namespace(config, STEP, 28, "local")
    args.attention_backend = _Backend.auto
    place = directory / f"iter_{STEP:07d}" / "mp_rank_00"
    place.mkdir(parents=True)
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": STEP,
        "model": chunks[0].module.state_dict_for_save_checkpoint(),
        "optimizer": optimizer.state_dict(),
        "rng_state": [{"np_rng_state": np.random.default_rng(1).bit_generator.state, "array": np.arange(3)}],
    }
    torch.save(state, place / "model_optim_rng.pt")
    if config.parallel.use_distributed_optimizer:
        (one,) = optimizers(optimizer)
        torch.save(one.get_parameter_state_dp_zero(use_gloo_comm=False), place / "distrib_optim.pt")
    (directory / "latest_checkpointed_iteration.txt").write_text(str(STEP))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bias", ["true", "false"])
def test_files_of_megatron_cores_optimizers_are_read(precision: str, optimizer: str, bias: str, tmp_path: Path) -> None:
    """Names, order, steps and flat buffers as megatron-core's own code makes them; the random states of numpy and the
    enums among the arguments are not run."""
    config = load_config(
        None,
        [
            *(*MODEL, f"training.precision={precision}", f"model.add_qkv_bias={bias}", f"model.qk_layernorm={bias}"),
            *OPTIMIZERS[optimizer],
        ],
    )
    ours = write_checkpoint(tmp_path / "ours", config, random_tensors(config)).parent
    _megatrons_files(config, ours, tmp_path / "megatron")
    theirs = open_checkpoint(str(tmp_path / "megatron"), ["model.mask_token_id=5"])
    assert theirs.kind == "legacy"
    assert theirs.config.model == config.model
    assert theirs.info.progress is not None
    assert theirs.info.progress["optimizer_step"] == PROGRESS["optimizer_step"]
    assert theirs.info.progress["consumed_samples"] == 28
    assert compare(open_checkpoint(str(ours)), theirs, processes=2).identical


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_megatron_cores_optimizers_take_what_is_written(precision: str, optimizer: str, tmp_path: Path) -> None:
    """Loaded as Megatron's load_checkpoint does it, into another model: weights, main weights and moments are ours."""
    config = load_config(
        None,
        [
            *(*MODEL, f"training.precision={precision}"),
            *OPTIMIZERS[optimizer],
        ],
    )
    tensors = random_tensors(config)
    write_checkpoint(tmp_path / "ours", config, tensors)
    change = LayoutChange(tensor=1, pipeline=1)
    reshard(open_checkpoint(str(tmp_path / "ours")), tmp_path / "legacy", change, "legacy", "local", processes=2)
    _load_as_megatron(config, tmp_path / "legacy", tmp_path / "again")
    theirs = open_checkpoint(str(tmp_path / "again"), ["model.mask_token_id=5"])
    assert compare(open_checkpoint(str(tmp_path / "ours")), theirs, processes=2).identical


def _load_as_megatron(config: RunConfig, legacy: Path, again: Path) -> None:
    """Into a new model and optimizer of megatron-core, and what they hold then as Megatron's files of one rank."""
    from illada_megatron.checkpoint.state import optimizers
    from illada_megatron.model import build_model_chunks
    from illada_megatron.training.gradient_reduction import wrap_data_parallel
    from illada_megatron.training.optimizer import build_optimizer

    place = legacy / f"iter_{STEP:07d}" / "mp_rank_00"
    with runtime(config) as run:
        chunks = wrap_data_parallel(config.parallel, build_model_chunks(config, run.device))
        optimizer = build_optimizer(config, chunks)
        state = torch.load(place / "model_optim_rng.pt", weights_only=False)
        chunks[0].module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if config.parallel.use_distributed_optimizer:
            (one,) = optimizers(optimizer)
            one.data_parallel_group_gloo = one.data_parallel_group
            flat = torch.load(place / "distrib_optim.pt", weights_only=False)
            with torch.no_grad():  # an fp32 model's main weights are views of its own, which autograd watches
                one.load_parameter_state_from_dp_zero(flat)
        _save_as_megatron(config, chunks, optimizer, again)

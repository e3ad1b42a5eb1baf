"""A return to a checkpoint while weights are being gathered, on two real ranks."""

import math
from pathlib import Path

import torch
from ranks import run_ranks
from test_layouts import BUCKETS, OVERLAP, UNTIED

from illada_megatron.checkpoint.owner import owned
from illada_megatron.checkpoint.saver import Saver
from illada_megatron.config import load_config
from illada_megatron.runtime import runtime
from illada_megatron.training.bad_steps import BadStep
from illada_megatron.training.rollback import recover
from illada_megatron.training.setup import TrainingState, setup
from illada_megatron.training.trainer import train_step

ROLLBACK = ("faults.on_bad_steps=rollback", "faults.max_bad_steps=1", "training.train_steps=9")


def _weights(state: TrainingState) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in state.chunks[0].module.named_parameters()}


def _worker(rank: int, arguments: tuple[str, ...], directory: str) -> None:
    """Two steps, a checkpoint, two steps, and back while every bucket is on its way."""
    config = load_config(None, [*arguments, f"checkpoint.save_dir={directory}/checkpoints"])
    with (
        runtime(config) as run,
        owned(config.checkpoint.save_dir, print) as owner,
        Saver(config, {}, None, owner) as saver,
    ):
        state = setup(config, run)
        for _ in range(2):
            train_step(state)
        saver.save(2, [chunk.module for chunk in state.chunks], state.optimizer, state.progress())
        (outcome,) = saver.wait()
        assert outcome.error is None
        state.fingerprints = {}
        state.chunks[0].start_param_sync(force_sync=True)
        saved = _weights(state)
        for _ in range(2):
            train_step(state)
        state.bad_steps.observe(BadStep(5, 16, 20, math.nan, math.nan))
        state.chunks[0].start_param_sync()
        under_way = [group.param_gather_handle is not None for group in state.chunks[0].bucket_groups]
        recover(state)
        torch.save((saved, under_way, _weights(state)), f"{directory}/{rank}.pt")
        state.close()


def test_rollback_waits_for_gathers(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """A forced gather that meets one under way takes it for its own: a rank would go on with what the others held
    before they went back."""
    arguments = (*tiny_run, *ROLLBACK, *OVERLAP, BUCKETS, UNTIED)
    run_ranks(_worker, 2, arguments, str(tmp_path))
    for rank in range(2):
        saved, under_way, found = torch.load(tmp_path / f"{rank}.pt")
        assert len(under_way) > 5
        assert all(under_way)
        assert found.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(found[name], saved[name])] == []

"""Adam's moments in bf16: stored in half of the bytes, computed in fp32, in every layout and checkpoint."""

from pathlib import Path

import pytest
import torch
from launch import TrainOnce, run_warm
from test_layouts import SEQUENCE, TP2

from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.training.optimizer import AdamW, AdamWInBf16

MOMENTS = "optimizer.moments_dtype=bf16"
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_rounds_nothing_but_what_it_stores() -> None:
    """Each step is AdamW's, of moments that were rounded after the step before."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
    inner, outer = AdamWInBf16([ours], **SETTINGS), AdamW([theirs], **SETTINGS)
    for _ in range(4):
        gradient = torch.randn(50, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        inner.step()
        outer.step()
        assert torch.equal(ours, theirs)
        for name, moment in outer.state[theirs].items():
            stored = inner.state[ours][name]
            assert stored.dtype == torch.bfloat16
            assert torch.equal(stored, moment.bfloat16())
            moment.copy_(stored)


def test_goes_on_under_another_layout_and_in_fp32(
    small: tuple[str, ...], train_once: TrainOnce, tmp_path: Path
) -> None:
    """Ten steps by one rank with bf16 moments; two ranks go on with them, and one with fp32 ones."""
    save_dir = tmp_path / "checkpoints"
    begin = run_warm("train", [*small, MOMENTS, "training.exit_steps=10", f"checkpoint.save_dir={save_dir}"])
    assert begin.process.returncode == 0, begin.output
    assert "moments in bf16" in begin.process.stdout
    tensors = TensorReader(save_dir / "step_00000010").tensors
    dtypes = {info.dtype for name, info in tensors.items() if "exp_avg" in name}
    assert dtypes == {torch.bfloat16}
    unbroken = train_once(1, MOMENTS).steps[10:]
    load = f"checkpoint.load_dir={save_dir}/step_00000010"
    for nproc, overrides, relative in ((2, (TP2, SEQUENCE, MOMENTS), 1e-3), (1, (), 0.02)):
        jsonl = tmp_path / f"{nproc}.jsonl"
        run = run_warm("train", [*small, *overrides, load], nproc, jsonl)
        assert run.process.returncode == 0, run.output
        for ours, theirs in zip(run.steps, unbroken, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=relative), ours["step"]

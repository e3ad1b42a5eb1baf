"""Short runs on a GPU where there is one: FP8 against bf16, overlapped exchanges, Transformer Engine's checkpoints in
the local layers and back. On a CPU the same in miniature: bf16 against fp32, and the local layers alone."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from accelerator import ON_GPU, need_layers
from launch import read_steps

from illada_megatron.config import load_config
from illada_megatron.training import train

pytestmark = pytest.mark.gpu
HIDDEN, LENGTH = (512, 256) if ON_GPU else (64, 32)
SHAPE = (
    *("model.num_layers=4", f"model.hidden_size={HIDDEN}", f"model.ffn_hidden_size={2 * HIDDEN}"),
    *("model.num_attention_heads=4", "model.num_query_groups=2", f"data.sequence_length={LENGTH}"),
    *(f"model.max_sequence_length={LENGTH}", "training.precision=bf16", "training.lr=1e-3", "runtime.device=auto"),
    *("schedule.decay_start=never", "training.global_batch_size=8"),
)


def _steps(tiny_run: tuple[str, ...], folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The log of a run; where it goes on, that of its beginning too."""
    jsonl = folder / "steps.jsonl"
    train(load_config(None, [*tiny_run, *SHAPE, f"logging.jsonl_path={jsonl}", *overrides]))
    return read_steps(jsonl)


def _losses(tiny_run: tuple[str, ...], folder: Path, *overrides: str) -> list[float]:
    folder.mkdir()
    return [step["loss"] for step in _steps(tiny_run, folder, *overrides)]


def test_fp8_learns_as_bf16_does(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """The same samples, masks and weights, 200 steps: the last 50 losses are the same within 2 %."""
    need_layers("transformer_engine" if ON_GPU else "local")
    steps, last, precisions = (200, 50, ("bf16", "fp8")) if ON_GPU else (4, 2, ("fp32", "bf16"))
    usual, lower = (
        _losses(tiny_run, tmp_path / precision, f"training.precision={precision}", f"training.train_steps={steps}")
        for precision in precisions
    )
    assert len(usual) == len(lower) == steps
    assert fmean(lower[-last:]) < fmean(lower[:last])
    assert fmean(lower[-last:]) == pytest.approx(fmean(usual[-last:]), rel=0.02)


def test_overlapped_exchanges_change_no_loss(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """Also with a head of its own, and buckets smaller than it."""
    for tied in ("true", "false"):
        common = [f"model.tie_word_embeddings={tied}", "training.train_steps=5"]
        overlap = [f"parallel.overlap_{what}=true" for what in ("grad_reduce", "param_gather")]
        overlap += ["parallel.ddp_bucket_size=4096"]
        plain = _losses(tiny_run, tmp_path / f"plain {tied}", *common)
        overlapped = _losses(tiny_run, tmp_path / f"overlapped {tied}", *common, *overlap)
        assert overlapped == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize(
    ("saves", "goes_on"),
    [("local", "local"), ("local", "transformer_engine"), ("transformer_engine", "local")],
)
def test_a_checkpoint_of_the_other_layers(saves: str, goes_on: str, tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """A run that changes its layers at step 3 has the losses of one that does not."""
    need_layers(saves)
    need_layers(goes_on)
    own = f"runtime.transformer_impl={saves}"
    whole = _losses(tiny_run, tmp_path / "whole", own, "training.train_steps=6")
    saved = ["training.train_steps=6", f"checkpoint.save_dir={tmp_path / 'checkpoints'}"]
    folder = tmp_path / "changed"
    folder.mkdir()
    _steps(tiny_run, folder, own, *saved, "training.exit_steps=3")
    changed = _steps(tiny_run, folder, f"runtime.transformer_impl={goes_on}", *saved)
    assert [step["loss"] for step in changed] == pytest.approx(whole, rel=5e-3)

"""Saving while the run goes on: the same checkpoints, on a disk that fails for a while, and in object storage."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import write_corpus
from launch import Illada, read_steps

from illada_megatron.checkpoint.files.tensors import TensorReader, TensorWriter
from illada_megatron.checkpoint.owner import owned
from illada_megatron.checkpoint.saver import Saver
from illada_megatron.checkpoint.store import newest_complete
from illada_megatron.config import load_config
from illada_megatron.runtime import runtime
from illada_megatron.training.setup import setup


def assert_same_tensors(found: Path | str, expected: Path | str) -> None:
    """Two checkpoints hold the same model and optimizer, bit for bit, in whatever pieces."""
    ours, theirs = TensorReader(found), TensorReader(expected)
    assert set(ours.tensors) == set(theirs.tensors)
    for name in theirs.tensors:
        assert torch.equal(ours.read(name), theirs.read(name)), name


def test_asynchronous_is_the_same_checkpoint(
    two_steps: Path, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """A state that changed under the writer's hands would differ."""
    jsonl = tmp_path / "steps.jsonl"
    outcome = illada(
        *("train", *tiny_run, "training.exit_steps=2", "checkpoint.interval_steps=1"),
        *(f"checkpoint.save_dir={tmp_path}", "checkpoint.asynchronous=false", f"logging.jsonl_path={jsonl}"),
    )
    assert outcome.code == 0, outcome.err
    for step in ("step_00000001", "step_00000002"):
        assert_same_tensors(tmp_path / step, two_steps / step)
    first, second = read_steps(jsonl)
    assert "save_seconds" not in first
    assert first["start_seconds"] > first["seconds"]
    assert "start_seconds" not in second
    assert 0 < second["save_stall_seconds"] <= second["save_seconds"]


def test_slow_disk_gets_the_state_as_it_was(
    tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step's optimizer is ready long before all is written: what it changes has to be copied first."""
    write = TensorWriter.write

    def slowly(*arguments: Any) -> None:
        time.sleep(0.03)
        write(*arguments)

    arguments = ("train", *tiny_run, "training.exit_steps=2", "checkpoint.interval_steps=1")
    at_once = (f"checkpoint.save_dir={tmp_path}/at_once", "checkpoint.asynchronous=false")
    assert illada(*arguments, *at_once).code == 0
    monkeypatch.setattr(TensorWriter, "write", slowly)
    assert illada(*arguments, f"checkpoint.save_dir={tmp_path}/slow").code == 0
    for step in ("step_00000001", "step_00000002"):
        assert_same_tensors(tmp_path / "slow" / step, tmp_path / "at_once" / step)


def test_a_fall_back_keeps_what_it_saves(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """The newest is damaged, the run goes back, and ends before it is there again: what it has saved then used to be
    deleted for the damaged one, which was newer and "complete"."""
    arguments = ("train", *tiny_run, "training.train_steps=40", f"checkpoint.save_dir={tmp_path}")
    arguments += ("checkpoint.interval_steps=10", "checkpoint.keep_last=1", "checkpoint.keep_every=20")
    assert illada(*arguments, "training.exit_steps=30").code == 0
    (file,) = (tmp_path / "step_00000030").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    outcome = illada(*arguments, "training.exit_steps=25")
    assert outcome.code == 0, outcome.err
    assert f"refused {file}: its bytes have changed" in outcome.out.replace("\n", "")
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000020", "step_00000025"]
    assert (tmp_path / "latest").read_text() == "step_00000025\n"
    assert newest_complete(tmp_path)[1] == []


def test_what_is_kept_when_steps_were_bad_or_come_again(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """In a row of bad steps an older checkpoint may be the one to return to; when the run has returned, those it has
    left behind are not its own any more."""
    config = load_config(None, [*tiny_run, f"checkpoint.save_dir={tmp_path}", "checkpoint.keep_last=1"])
    bad = {"bad_steps": {"streak": [{"step": 2}]}}
    with (
        runtime(config) as run,
        owned(config.checkpoint.save_dir, print) as owner,
        Saver(config, {}, None, owner) as saver,
    ):
        state = setup(config, run)

        def save(step: int, **progress: Any) -> list[int]:
            saver.save(step, [chunk.module for chunk in state.chunks], state.optimizer, progress)
            (outcome,) = saver.wait()
            assert (outcome.error, outcome.warnings) == (None, ())
            return sorted(int(path.name.removeprefix("step_")) for path in tmp_path.glob("step_*"))

        assert save(1) == [1]
        assert save(2, **bad) == [1, 2]
        assert save(3, **bad) == [1, 2, 3]
        assert save(4) == [4]
        assert save(5, **bad) == [4, 5]
        saver.went_back(4, in_place=True)
        assert save(6) == [6]
        assert save(7, **bad) == [6, 7]
        saver.went_back(6, in_place=True)
        assert save(8, **bad) == [6, 8]
        state.close()


def test_in_object_storage(s3: str, two_steps: Path, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """Saved, found, checked, continued and evaluated there, as on a disk; what is damaged there is refused."""
    place = f"{s3}/run"
    arguments = ("train", *tiny_run, f"checkpoint.save_dir={place}", "checkpoint.interval_steps=1")
    outcome = illada(*arguments, "training.exit_steps=2", "checkpoint.keep_last=2")
    assert outcome.code == 0, outcome.err
    assert_same_tensors(f"{place}/step_00000002", two_steps / "step_00000002")
    jsonl, expected = tmp_path / "remote.jsonl", tmp_path / "local.jsonl"
    outcome = illada(*arguments, "checkpoint.keep_last=2", f"logging.jsonl_path={jsonl}")
    assert outcome.code == 0, outcome.err
    assert f"continues from {place}/step_00000002: step 2" in outcome.out.replace("\n", "")
    illada("train", *tiny_run, f"checkpoint.load_dir={two_steps}", f"logging.jsonl_path={expected}")
    assert [step["loss"] for step in read_steps(jsonl)] == [step["loss"] for step in read_steps(expected)]
    info, refused = newest_complete(place)
    assert info is not None
    assert (info.step, refused) == (3, [])
    assert info.path.parent.folders() == ["step_00000002", "step_00000003"]
    name = next(name for name in info.files if name.endswith(".distcp"))
    content = bytearray(info.path.read(name))
    content[len(content) // 2] ^= 1
    info.path.replace(name, bytes(content))
    older, refused = newest_complete(place)
    assert older is not None
    assert older.step == 2
    assert "its bytes have changed" in refused[0]
    outcome = illada("evaluate", "--checkpoint", place)
    assert outcome.code == 0, outcome.err
    assert "held-out bound" in outcome.out


def test_other_data_is_an_error_unless_allowed(
    two_steps: Path, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """The same sample indices would mean other tokens; the same tokens in other shards do not."""
    other = tmp_path / "other"
    write_corpus(other)
    np.fromfile(tmp_path / "other.bin", dtype=np.uint16)[::-1].tofile(tmp_path / "other.bin")
    load = f"checkpoint.load_dir={two_steps}"
    for override, difference in (
        (f"data.train_paths=[{other}]", "data.corpora. was"),
        ("training.seed=5", "data.order.seed was 1234, is 5"),
        ("data.sequence_length=16", "data.order.sequence_length was 32, is 16"),
    ):
        outcome = illada("train", *tiny_run, load, override)
        assert outcome.code == 2, override
        assert difference in outcome.err
        assert 'set checkpoint.allow_mismatch=["data"]' in outcome.err
        outcome = illada("train", *tiny_run, load, override, 'checkpoint.allow_mismatch=["data"]')
        assert outcome.code == 0, outcome.err
        assert f"warning: {two_steps}/step_00000002: {difference}" in outcome.out.replace("\n", "")
    same = write_corpus(tmp_path / "same")
    assert illada("train", *tiny_run, load, f"data.train_paths=[{same}]").code == 0


def test_tokenizer_is_part_of_the_checkpoint(
    two_steps: Path, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    save = f"checkpoint.save_dir={tmp_path / 'checkpoints'}"
    tokenizer = tmp_path / "tokenizer.json"
    words = {"[MASK]": 0} | {chr(97 + index): index + 6 for index in range(26)}  # none of them the mask, 5
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "a"}}
    tokenizer.write_text(json.dumps(content))
    given = f"data.tokenizer_path={tokenizer}"
    assert illada("train", *tiny_run, f"checkpoint.load_dir={two_steps}", given).code == 2  # it had none
    outcome = illada("train", *tiny_run, save, given, "training.exit_steps=2")
    assert outcome.code == 0, outcome.err
    words["z"] = 40
    tokenizer.write_text(json.dumps(content))
    outcome = illada("train", *tiny_run, save, given)
    assert outcome.code == 2
    assert "tokenizer was" in outcome.err
    assert illada("train", *tiny_run, save, given, 'checkpoint.allow_mismatch=["tokenizer"]').code == 0


def test_model_that_may_differ(two_steps: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """Another rotary base, say for a longer context, where it is meant; never another shape."""
    allowed = ("train", *tiny_run, f"checkpoint.load_dir={two_steps}", 'checkpoint.allow_mismatch=["model"]')
    assert illada(*allowed, "model.rotary_base=10000.0").code == 0
    outcome = illada(*allowed[:-1], "model.rotary_base=10000.0")
    assert 'model.rotary_base=500000.0, or set checkpoint.allow_mismatch=["model"] where' in outcome.err
    for arguments in (allowed, allowed[:-1]):
        outcome = illada(*arguments, "model.ffn_hidden_size=64")
        assert outcome.code == 2
        assert "take the checkpoint's: model.ffn_hidden_size=48\n" in outcome.err  # no advice that leads nowhere
    assert "decoder.layers.0.mlp.linear_fc1.weight has shape (96, 32), this model's is (128, 32)" in outcome.err


def _main(reader: TensorReader, name: str) -> torch.Tensor:
    main = f"optimizer.main.{name}"
    return reader.read(main if main in reader.tensors else name)


@pytest.mark.parametrize("precisions", [("fp32", "bf16"), ("bf16", "fp32")])
def test_precision_may_change(
    precisions: tuple[str, str], tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """The main weights are fp32 in both: nothing is lost on the way to fp32 and back."""
    first, second = (f"training.precision={precision}" for precision in precisions)
    there, back = (f"checkpoint.save_dir={tmp_path / name}" for name in ("there", "back"))
    assert illada("train", *tiny_run, first, there, "training.exit_steps=2").code == 0
    outcome = illada("train", *tiny_run, second, back, "training.exit_steps=2", f"checkpoint.load_dir={tmp_path}/there")
    assert outcome.code == 0, outcome.err
    saved = TensorReader(tmp_path / "there" / "step_00000002"), TensorReader(tmp_path / "back" / "step_00000002")
    for name in saved[0].tensors:
        if name.startswith("optimizer.exp"):
            assert torch.equal(saved[0].read(name), saved[1].read(name)), name
        elif not name.startswith("optimizer."):
            assert torch.equal(*(_main(reader, name) for reader in saved)), name

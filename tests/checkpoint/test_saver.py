"""Saving while the run goes on: the same checkpoints, on a disk that fails for a while, and in object storage."""

import json
import re
import resource
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pytest
import torch
from corpus import write_corpus
from launch import HANG_SECONDS, SMALL, Illada, launch, rank_processes, read_steps, wait_for_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from illada_megatron.checkpoint import saver as saver_module
from illada_megatron.checkpoint import store, writing
from illada_megatron.checkpoint.files import patience
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.tensors import TensorReader, TensorWriter
from illada_megatron.checkpoint.owner import owned
from illada_megatron.checkpoint.saver import Saver
from illada_megatron.checkpoint.store import newest_complete
from illada_megatron.config import load_config
from illada_megatron.runtime import runtime
from illada_megatron.training.setup import setup
from illada_megatron.training.trainer import train_step


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


def test_disk_full_for_a_while(tmp_path: Path) -> None:
    """One rank of two cannot write more than some kilobytes a file: the run says so, keeps its last good checkpoint,
    goes on, saves again when it can, and has computed what it would have."""
    corpus = write_corpus(tmp_path / "corpus")
    jsonl, save_dir = tmp_path / "steps.jsonl", tmp_path / "checkpoints"
    arguments = [*SMALL, f"data.train_paths=[{corpus}]", "logging.interval_steps=1"]

    def limit(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, 3, launcher)
        rank = rank_processes(launcher)[1]
        before = rank.rlimit(resource.RLIMIT_FSIZE)
        rank.rlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
        wait_for_step(jsonl, 10, launcher)
        rank.rlimit(resource.RLIMIT_FSIZE, before)

    saving = [f"checkpoint.save_dir={save_dir}", "checkpoint.interval_steps=2", "checkpoint.keep_last=1"]
    saving += ["checkpoint.max_failed_saves=10", f"logging.tensorboard_dir={tmp_path / 'board'}"]
    run = launch("train", [*arguments, *saving], 2, jsonl, limit)
    assert run.process.returncode == 0, run.output
    said = run.process.stdout
    failed = [int(step) for step in re.findall(r"step (\d+): could not be saved: rank 1: .*File too large", said)]
    assert failed, said
    assert set(failed) <= {4, 6, 8, 10, 12}
    saved = [int(step) for step in re.findall(r"saved \S+/step_(\d+):", said)]
    assert 2 in saved
    assert saved[-1] == 20
    assert not set(failed) & set(saved)
    assert [path.name for path in save_dir.glob("step_*")] == ["step_00000020"]
    assert newest_complete(save_dir)[1] == []
    assert [step["loss"] for step in run.steps] == [
        step["loss"] for step in launch("train", arguments, 2, tmp_path / "undisturbed.jsonl").steps
    ]
    logged = [one for step in run.steps for one in step.get("failed_saves", [])]
    assert [one["step"] for one in logged] == failed
    assert all("File too large" in one["error"] for one in logged)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert max(event.value for event in events.Scalars("checkpoint/failed_saves")) == len(failed)
    assert [event.step for event in events.Tensors("faults/save/text_summary")] == failed
    ages = [event.value for event in events.Scalars("checkpoint/age_seconds")]
    assert ages == pytest.approx([step["checkpoint_age_seconds"] for step in run.steps], abs=1)
    for step, earlier in zip(run.steps[1:], run.steps, strict=False):
        if step["checkpoint_step"] == earlier["checkpoint_step"]:
            assert step["checkpoint_age_seconds"] > earlier["checkpoint_age_seconds"]
    assert {step["checkpoint_step"] for step in run.steps} <= {None, *saved}
    assert run.steps[failed[-1] - 1]["checkpoint_step"] < failed[0]


def test_too_many_saves_that_fail_end_the_run(tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """Else it goes on for days with nothing to return to."""
    jsonl = tmp_path / "steps.jsonl"
    for step in range(1, 100):
        (tmp_path / f"step_{step:08d}").write_text("in the way")
    outcome = illada(
        *("train", *tiny_run, "training.train_steps=90", "checkpoint.interval_steps=1", f"logging.jsonl_path={jsonl}"),
        *(f"checkpoint.save_dir={tmp_path}", "checkpoint.max_failed_saves=3"),
    )
    assert outcome.code == 1  # a launcher may try again
    assert re.search(
        r"\d+ saves in a row have failed \(checkpoint.max_failed_saves\), the last with: rank 0", outcome.err
    )
    assert "there is none yet" in outcome.out
    lines = read_steps(jsonl)
    failed = [one["step"] for line in lines for one in line.get("failed_saves", [])]
    assert [*dict.fromkeys(failed)] == list(range(1, failed[-1] + 1))  # the last one is tried again
    assert 3 <= len(failed) <= 7  # asynchronous: more may be on their way; and the last two tries


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_last_state_that_cannot_be_saved_is_an_error(
    asynchronous: str, two_steps: Path, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """Nobody has to read the log to know that the run's result is lost."""
    (tmp_path / "step_00000003").write_text("in the way")
    jsonl = tmp_path / "steps.jsonl"
    outcome = illada(
        *("train", *tiny_run, f"checkpoint.load_dir={two_steps}", f"checkpoint.save_dir={tmp_path}"),
        *(f"checkpoint.asynchronous={asynchronous}", f"logging.jsonl_path={jsonl}"),
    )
    assert outcome.code == 1  # a launcher may try again
    assert "step 3: the run's last state could not be saved" in outcome.err
    assert f"{tmp_path}/step_00000003/" in outcome.err
    assert [one["step"] for one in read_steps(jsonl)[-1]["failed_saves"]] == [3, 3]  # tried twice


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


def test_what_fails_behind_the_record_takes_nothing_back(
    tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """A pointer that cannot be moved used to clear the complete checkpoint, and the run had none."""
    (tmp_path / "latest").mkdir()
    outcome = illada("train", *tiny_run, f"checkpoint.save_dir={tmp_path}", "checkpoint.interval_steps=1")
    assert outcome.code == 0, outcome.err
    assert "`latest` could not be moved to step_00000003: " in outcome.out
    info, refused = newest_complete(tmp_path)
    assert info is not None
    assert (info.step, refused) == (3, [])


def _full(place: LocalFolder, name: str) -> NoReturn:
    raise OSError(28, "No space left on device", f"{place}/{name}")


def test_a_disk_that_is_full_at_the_start_does_not_keep_a_run_from_going_on(
    tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had filled when the launcher started the run again; where there is nothing to go on from, it is an error."""
    run = [*tiny_run, f"checkpoint.save_dir={tmp_path / 'run'}", "checkpoint.interval_steps=1"]
    assert illada("train", *run, "training.exit_steps=1").code == 0
    replace, times = LocalFolder.replace, [0]

    def full_at_first(place: LocalFolder, name: str, content: bytes) -> None:
        times[0] += 1
        if times[0] <= 8:  # as often as it is tried, before and after the checkpoint is loaded
            _full(place, name)
        replace(place, name, content)

    monkeypatch.setattr(LocalFolder, "replace", full_at_first)
    monkeypatch.setattr(patience, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    outcome = illada("train", *run, "training.exit_steps=2")
    assert outcome.code == 0, outcome.err
    assert "run cannot be written to: [Errno 28] No space left" in outcome.out
    info, _ = newest_complete(tmp_path / "run")
    assert info is not None
    assert info.step == 2
    owner = json.loads((tmp_path / "run" / "owner.json").read_text())["attempt"]
    assert f"__0_{owner}.distcp" in info.files

    times[0] = 0
    outcome = illada("train", *tiny_run, f"checkpoint.save_dir={tmp_path / 'new'}")
    assert outcome.code == 1
    assert "No space left" in outcome.err


def test_a_record_whose_flush_fails_stays(
    tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be durable: the save has failed, the checkpoint is not cleared, and not by a second try either, which the
    disk then has no room for."""
    replace = LocalFolder.replace

    def fail(place: LocalFolder, name: str, content: bytes) -> None:
        replace(place, name, content)
        if place.name == "step_00000003":
            monkeypatch.setattr(LocalFolder, "create", _full)
            raise OSError(5, "Input/output error", str(place))

    monkeypatch.setattr(LocalFolder, "replace", fail)
    monkeypatch.setattr(patience, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    outcome = illada("train", *tiny_run, f"checkpoint.save_dir={tmp_path}")
    assert outcome.code == 1
    assert "step 3: the run's last state could not be saved" in outcome.err
    info, refused = newest_complete(tmp_path)
    assert info is not None
    assert (info.step, refused) == (3, [])


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


def test_the_time_limit_begins_when_the_save_before_has_ended(
    tiny_run: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is deleted afterwards has one of its own: the checkpoint is complete."""
    config = load_config(None, [*tiny_run, f"checkpoint.save_dir={tmp_path}", "checkpoint.save_timeout_minutes=0.1"])
    monkeypatch.setattr(saver_module, "_GRACE_SECONDS", 0.0)
    limit_seconds, ended = 6.0, list[float]()
    finish, prune = store.finish, writing.prune

    def slow_finish(*arguments: Any) -> None:
        time.sleep(2.5)
        finish(*arguments)

    def slow_prune(*arguments: Any) -> list[str]:
        time.sleep(4.0)
        ended.append(time.monotonic())
        return prune(*arguments)

    monkeypatch.setattr(store, "finish", slow_finish)
    monkeypatch.setattr(writing, "prune", slow_prune)
    with (
        runtime(config) as run,
        owned(config.checkpoint.save_dir, print) as owner,
        Saver(config, {}, None, owner) as saver,
    ):
        state = setup(config, run)
        models = [chunk.module for chunk in state.chunks]
        assert saver.save(1, models, state.optimizer, state.progress()) == []
        (outcome,) = saver.save(2, models, state.optimizer, state.progress())
        assert (outcome.step, outcome.error) == (1, None)
        assert saver._writing is not None
        assert saver._writing.job.begin >= ended[0]
        assert saver._writing.job.limit_seconds == limit_seconds
        (outcome,) = saver.wait()
        assert (outcome.step, outcome.error) == (2, None)
        state.close()


def test_a_save_that_fails_before_it_writes_copies_nothing(
    tiny_run: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of a model and its optimizer would be made, and its memory kept, for nobody."""
    config = load_config(None, [*tiny_run, f"checkpoint.save_dir={tmp_path}"])
    (tmp_path / "step_00000001").write_text("in the way")
    monkeypatch.setattr(Saver, "_copy", lambda _, part: pytest.fail(f"copied {part.name}"))
    with (
        runtime(config) as run,
        owned(config.checkpoint.save_dir, print) as owner,
        Saver(config, {}, None, owner) as saver,
    ):
        state = setup(config, run)
        assert saver.save(1, [chunk.module for chunk in state.chunks], state.optimizer, state.progress()) == []
        assert saver._writing is not None
        saver._writing.join(HANG_SECONDS)
        train_step(state)
        (outcome,) = saver.wait()
        assert "Not a directory" in str(outcome.error)
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
    words = {"[MASK]": 0} | {chr(97 + index): index + 1 for index in range(26)}
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "a"}}
    tokenizer.write_text(json.dumps(content))
    given = f"data.tokenizer_path={tokenizer}"
    assert illada("train", *tiny_run, f"checkpoint.load_dir={two_steps}", given).code == 2  # it had none
    outcome = illada("train", *tiny_run, save, given, "training.exit_steps=2")
    assert outcome.code == 0, outcome.err
    words["z"] = 30
    tokenizer.write_text(json.dumps(content))
    outcome = illada("train", *tiny_run, save, given)
    assert outcome.code == 2
    assert "tokenizer was" in outcome.err
    assert illada("train", *tiny_run, save, given, 'checkpoint.allow_mismatch=["tokenizer"]').code == 0


def test_model_that_may_differ(two_steps: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """Another rotary base, say for a longer context, where it is meant; never another shape."""
    allowed = ("train", *tiny_run, f"checkpoint.load_dir={two_steps}", 'checkpoint.allow_mismatch=["model"]')
    assert illada(*allowed, "model.rotary_base=10000.0").code == 0
    outcome = illada(*allowed, "model.ffn_hidden_size=64")
    assert outcome.code == 2
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

"""Saves that fail, and what fails behind a save: nothing that is durable is lost, and what is said is so."""

import json
import re
import resource
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from corpus import write_corpus
from launch import HANG_SECONDS, SMALL, Illada, launch, rank_processes, read_steps, run_warm, wait_for_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from illada_megatron.checkpoint import saver as saver_module
from illada_megatron.checkpoint import store, writing
from illada_megatron.checkpoint.files import patience
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.owner import owned
from illada_megatron.checkpoint.saver import Saver
from illada_megatron.checkpoint.store import newest_complete
from illada_megatron.config import load_config
from illada_megatron.runtime import runtime
from illada_megatron.training.setup import setup
from illada_megatron.training.trainer import train_step


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
        step["loss"] for step in run_warm("train", arguments, 2, tmp_path / "undisturbed.jsonl").steps
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


@pytest.mark.parametrize(("train_steps", "code"), [(4, 0), (50, 1)])
def test_what_the_last_try_saves_after_too_many_failures_is_the_runs_result(
    train_steps: int,
    code: int,
    tmp_path: Path,
    tiny_run: tuple[str, ...],
    illada: Illada,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Storage is back when the run gives up: what was trained meanwhile is kept; a run that is done needs no other."""
    create, failed = LocalFolder.create, set[str]()

    def full_at_first(place: LocalFolder, name: str) -> Any:
        if place.name.startswith("step_") and place.name not in failed and len(failed) < 4:
            failed.add(place.name)
            _full(place, name)
        return create(place, name)

    monkeypatch.setattr(LocalFolder, "create", full_at_first)
    outcome = illada(
        *("train", *tiny_run, f"training.train_steps={train_steps}", "checkpoint.interval_steps=1"),
        *(f"checkpoint.save_dir={tmp_path}", "checkpoint.max_failed_saves=3", "checkpoint.asynchronous=false"),
    )
    assert outcome.code == code, outcome.err
    info, _ = newest_complete(tmp_path)
    assert info is not None
    assert f"saved {info.path}" in outcome.out.replace("\n", "")
    if code:
        assert f"before this one; the last good checkpoint in {tmp_path} is of step {info.step}" in outcome.err
    else:
        assert info.step == train_steps


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

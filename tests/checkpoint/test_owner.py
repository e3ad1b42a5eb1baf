"""Two attempts on one save_dir: the second takes over, the first notices and leaves everything alone."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import ROOT, launch, wait_for_step

from illada_megatron.checkpoint.files.storage import Folder, folder
from illada_megatron.checkpoint.owner import OWNER, Ownership, TakenOverError, new_owner
from illada_megatron.checkpoint.store import newest_complete


def _newcomer(place: Folder) -> Ownership:
    ownership = Ownership(place, new_owner())
    ownership.take()
    ownership.require()
    return ownership


@pytest.mark.parametrize("where", ["disk", "object storage"])
def test_the_last_who_comes_owns_it(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = folder(tmp_path / "new" if where == "disk" else f"{request.getfixturevalue('s3')}/owned")
    first, second = _newcomer(place), _newcomer(place)
    second.require()
    name = second.owner.attempt
    with pytest.raises(TakenOverError, match=f"another run has taken it over .attempt {name}, on ") as raised:
        first.require()
    assert not raised.value.same_run
    place.remove(OWNER)  # somebody cleared the directory: whose turn it is says who comes first
    second.require()
    with pytest.raises(TakenOverError):
        first.require()
    place.replace(OWNER, b"\0" * 20)
    with pytest.raises(OSError, match="names no owner"):  # no other's name: a restart mends it
        second.require()


@pytest.mark.parametrize(
    ("variable", "value", "same_run"),
    [("TORCHELASTIC_RUN_ID", "ours", True), ("SLURM_JOB_ID", "7", True), ("TORCHELASTIC_RUN_ID", "none", False)],
)
def test_a_newer_attempt_of_the_same_run(
    variable: str, value: str, same_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher of a rank 0 that was cut off may start it again: it joins the others. torchrun's "none" is every
    run's name."""
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    place = folder(tmp_path)
    first, _ = _newcomer(place), _newcomer(place)
    with pytest.raises(TakenOverError) as raised:
        first.require()
    assert raised.value.same_run is same_run


def test_a_run_whose_save_dir_another_took_ends(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """Started by mistake, while the first goes on saving: one of the two has to end, with a message and a code that no
    launcher answers with a restart, and what the other has saved is whole."""
    save_dir, jsonl = tmp_path / "checkpoints", tmp_path / "steps.jsonl"
    # all are kept: one that the second has begun to load would go otherwise, and it could not start
    arguments = [*tiny_run, f"checkpoint.save_dir={save_dir}", "checkpoint.interval_steps=20"]
    arguments += ["training.train_steps=1000000", "logging.interval_steps=1000"]

    def start_another(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, 25, launcher)
        line = [sys.executable, "-m", "illada_megatron", "train", *arguments]
        second = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            while launcher.status() != psutil.STATUS_ZOMBIE:
                assert second.poll() is None, "the second did not start"
                time.sleep(0.1)
            second.terminate()
            assert second.wait() == 0  # it has saved
        finally:
            second.kill()

    run = launch("train", [*arguments, "--max-restarts", "5"], 2, jsonl, start_another)
    assert run.process.returncode == 2, run.output
    assert "start again" not in run.output
    assert "another run has taken it over" in run.process.stderr
    assert "give each run a checkpoint.save_dir of its own" in run.process.stderr
    info, refused = newest_complete(save_dir)
    assert info is not None
    assert refused == []
    owner = json.loads((save_dir / OWNER).read_text())["attempt"]
    assert f"__0_{owner}.distcp" in info.files

"""A stop inside a row of bad steps saves weights that may be what is bad: they are not what a rollback returns to."""

from pathlib import Path

from launch import Illada, read_steps


def test_rollback_returns_to_before_the_row(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """Three good steps; the update of the fourth ruins the weights, the run is stopped in the fifth, which is the first
    bad one, and saves. Started again it meets more bad steps, goes back to step 3 and not to step 5, and ends as it
    should. Where there is nothing from before the row, it says so."""
    save_dir, jsonl = tmp_path / "save", tmp_path / "steps.jsonl"
    arguments = [*tiny_run, "training.train_steps=12", "schedule.decay_start=never", f"logging.jsonl_path={jsonl}"]
    arguments += ["faults.on_bad_steps=rollback", "faults.max_bad_steps=3", "faults.rollback_margin_steps=0"]
    arguments += [f"checkpoint.save_dir={save_dir}"]
    assert illada("train", *arguments, "training.exit_steps=3").code == 0
    ruined = illada("train", *arguments, "training.lr=1e30", "training.exit_steps=5")
    assert ruined.code == 0, ruined.err
    assert "step       5  skipped" in ruined.out
    assert (save_dir / "latest").read_text() == "step_00000005\n"

    again = illada("train", *arguments)
    assert again.code == 0, again.err
    assert f"continues from {save_dir}/step_00000005" in again.out
    assert again.out.count(f"rolled back from step 7 to {save_dir}/step_00000003: 3 bad steps in a row") == 1
    steps = read_steps(jsonl)
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert not any(step["skipped"] for step in steps)
    # the samples of steps 5 to 7 are passed over: that of step 4 was a good one, and is trained on again
    assert [step["first_sample"] for step in steps[3:5]] == [12, 28]


def test_rollback_to_the_checkpoint_that_the_run_began_with(
    tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """It is not in save_dir: what is saved after it, at a step that is saved there already or before one, counts."""
    begun_with, save_dir = tmp_path / "begun_with", tmp_path / "save"
    arguments = [*tiny_run, "training.train_steps=12", "schedule.decay_start=never", "faults.on_bad_steps=rollback"]
    arguments += ["faults.max_bad_steps=3", "faults.rollback_margin_steps=0"]
    assert illada("train", *arguments, f"checkpoint.save_dir={begun_with}", "training.exit_steps=3").code == 0
    arguments += [f"checkpoint.load_dir={begun_with}", f"checkpoint.save_dir={save_dir}", "checkpoint.keep_last=2"]
    ruined = illada("train", *arguments, "training.lr=1e30", "training.exit_steps=5")
    assert ruined.code == 0, ruined.err
    assert (save_dir / "latest").read_text() == "step_00000005\n"

    again = illada("train", *arguments, "checkpoint.interval_steps=4", "training.exit_steps=8")
    assert again.code == 0, again.err
    assert f"rolled back from step 7 to {begun_with}/step_00000003" in again.out
    assert sorted(path.name for path in save_dir.glob("step_*")) == ["step_00000004", "step_00000008"]
    assert (save_dir / "latest").read_text() == "step_00000008\n"


def test_there_is_nothing_from_before_the_row(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    save_dir = tmp_path / "save"
    arguments = [*tiny_run, "training.train_steps=12", f"checkpoint.save_dir={save_dir}", "training.lr=1e30"]
    arguments += ["faults.on_bad_steps=rollback", "faults.max_bad_steps=3"]
    assert illada("train", *arguments, "training.exit_steps=2").code == 0
    again = illada("train", *arguments)
    assert again.code == 3
    assert (
        f"no checkpoint of this run to roll back to; {save_dir}/step_00000002: was saved in a row of bad" in again.err
    )

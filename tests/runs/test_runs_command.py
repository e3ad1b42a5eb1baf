"""`illada runs` on folders and logs that were written here: what differs, and figures at the same places."""

import json
from pathlib import Path

import pytest
import yaml
from launch import Illada


def held_out(step: int, bound: float, ema: bool = False) -> dict[str, object]:
    return {"step": step, "ema": ema, "mean": {"nats_per_token": {"value": bound, "standard_error": 0.1}}}


def _write_run(folder: Path, lr: float, steps: int, tokens: int, loss: float) -> Path:
    """A run of `tokens` a step whose loss falls by 0.01 a step; a bound every ten steps, with the step that follows."""
    folder.mkdir()
    configuration = {"run_dir": str(folder), "training": {"lr": lr, "train_steps": 40}, "logging": {"jsonl_path": None}}
    (folder / "start_0001.yaml").write_text(yaml.safe_dump({**configuration, "training": {"lr": 9.0}}))
    (folder / "start_0002.yaml").write_text("# a start\n" + yaml.safe_dump(configuration))
    with (folder / "steps.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "loss": loss - 0.01 * step,
                "consumed_tokens": tokens * step,
                "tokens_per_second": 100.0,
            }
            if step == 1:
                record["start_seconds"] = 1.0
            if step % 10 == 1 and step > 1:
                record["held_out"] = [held_out(step - 1, loss - 1), held_out(step - 1, loss - 3, ema=True)]
            if step == steps:
                record["held_out"] = [held_out(step, loss - 2)]
            file.write(json.dumps(record) + "\n")
        file.write('{"step": 99, "lo')  # a run that is writing
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [_write_run(tmp_path / "a", 1e-3, 20, 100, 5.0), _write_run(tmp_path / "b", 5e-4, 10, 400, 4.0)]


def test_fields_that_differ_and_figures_by_steps(
    two: list[Path], illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two[0].parent)
    monkeypatch.setenv("COLUMNS", "120")
    outcome = illada("runs", "a", "b", "--rows", 2)
    assert outcome.code == 0, outcome.err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    assert ["training.lr", "0.001", "0.0005"] in rows
    assert not any("train_steps" in row[0] for row in rows)
    # the mean of steps 1 to 10, and of 11 to 20, which b has not done
    assert ["10", "4.9450", "3.9450", "4.0000", "2.0000", "100", "100"] in rows
    assert ["20", "4.8450", "-", "3.0000", "-", "100", "-"] in rows


def test_figures_by_tokens_as_json_and_a_picture(two: list[Path], tmp_path: Path, illada: Illada) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    outcome = illada("runs", two[0], two[1] / "steps.jsonl", "--by", "tokens", "--rows", 2, "--json", "--png", picture)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [(one["last_step"], one["consumed_tokens"], one["starts"]) for one in found["runs"]] == [
        (20, 2000, 1),
        (10, 4000, 1),
    ]
    assert found["differs"]["training.lr"] == {str(two[0]): 1e-3, str(two[1] / "steps.jsonl"): 5e-4}
    assert [row["at"] for row in found["rows"]] == [2000, 4000]
    assert found["rows"][1]["loss"] == [None, pytest.approx(3.92)]
    assert found["runs"][1]["curves"]["held_out"] == {"steps": [10], "tokens": [4000], "values": [2.0]}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no steps.jsonl"), ("", "has no steps yet"), ("[1]\n", "steps.jsonl:1: not a line of")],
)
def test_no_run(content: str | None, message: str, tmp_path: Path, illada: Illada) -> None:
    if content is not None:
        (tmp_path / "steps.jsonl").write_text(content)
    outcome = illada("runs", tmp_path)
    assert outcome.code == 2
    assert message in outcome.err

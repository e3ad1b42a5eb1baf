"""A run is a folder: what lies there, what a start that continues says, and that two runs do not share."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from launch import ROOT, Illada, read_steps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from illada_megatron.config import load_config
from illada_megatron.runs.records import newest_start
from illada_megatron.training.run_places import RUN_NAME_FILE, is_own, same_run, write_start
from illada_megatron.training.wandb_board import ID_FILE


@pytest.fixture(scope="module")
def one_step(tiny_run: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has done its first of three steps."""
    from illada_megatron.training import train

    run = tmp_path_factory.mktemp("one_step") / "run"
    train(load_config(None, [*tiny_run, f"run_dir={run}", "training.exit_steps=1", "validation.interval_steps=1"]))
    return run


@pytest.fixture
def run(one_step: Path, tmp_path: Path) -> Path:
    """A copy of it, under another path: the run's name is that of the copy."""
    copy = tmp_path / "run"
    shutil.copytree(one_step, copy)
    for name in ("steps.jsonl", "tensorboard/run.txt"):
        (copy / name).write_text((copy / name).read_text().replace(str(one_step), str(copy)))
    return copy


def _board(run: Path) -> EventAccumulator:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return board


def test_a_start_that_continues(run: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """Everything is in the folder; changed fields are said, old and new, and logged; nothing is written over."""
    first = (run / "start_0001.yaml").read_bytes()
    lr = load_config(run / "start_0001.yaml").training.lr
    changed = ("training.lr=5e-4", "diffusion.eps=0.01", "training.micro_batch_size=1", "logging.interval_steps=1")
    outcome = illada("train", *tiny_run, f"run_dir={run}", *changed)
    assert outcome.code == 0, outcome.err
    where = run / "checkpoints" / "step_00000001"
    assert f"continues from {where}: step 1" in outcome.out
    assert f"changed since {where}: training.lr {lr} -> 0.0005" in outcome.out
    assert f"changed since {where}: diffusion.eps 0.001 -> 0.01" in outcome.out
    assert "changed in the layout only: training.micro_batch_size 2 -> 1" in outcome.out
    assert "changed in what is written: " in outcome.out
    assert "logging.interval_steps 10 -> 1" in outcome.out

    assert (run / "start_0001.yaml").read_bytes() == first
    second = load_config(run / "start_0002.yaml")
    assert (second.training.lr, second.run_dir) == (5e-4, str(run))
    assert "# illada train" in (run / "start_0002.yaml").read_text()
    steps = read_steps(run / "steps.jsonl")
    assert [one["step"] for one in steps if "loss" in one] == [1, 2, 3]
    assert steps[0]["run_dir"] != ""
    next_step = next(one for one in steps if one["step"] == 2)
    assert next_step["changed"]["training.lr"] == [lr, 0.0005]
    held_out = [one for step in steps for one in step.get("held_out", [])]
    assert [one["step"] for one in held_out] == [1]  # validation was on in the first start alone

    board = _board(run)
    assert [event.step for event in board.Scalars("loss/nats_per_token")] == [1, 2, 3]
    configurations = board.Tensors("run/configuration/text_summary")
    assert [event.step for event in configurations] == [0, 1]
    assert "    lr: 0.0005" in configurations[1].tensor_proto.string_val[0].decode()
    assert (
        f"training.lr {lr} -> 0.0005"
        in board.Tensors("run/changed/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    page = (ROOT / "docs" / "training.md").read_text()
    for tag in board.Tags()["scalars"]:
        stem = re.sub(r"\d\.\d-\d\.\d$", "0.3-0.4", tag)
        if tag.startswith("validation_by_position"):  # places follow data.sequence_length
            stem = re.sub(r"/\d+-\d+$", "/0-15", tag)
        if tag.startswith("stragglers/"):  # `_min`, `_median`, `_max` share a row
            stem = re.sub(r"_(median|max)$", "_min", tag)
        assert f"`{stem}`" in page, f"docs/training.md does not say what {tag} is"
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["training.lr"].number_value == lr
    assert hparams["diffusion.t_sampling"].string_value == "stratified"


def test_a_finished_run_says_so(run: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    before = {path: path.read_bytes() for path in (run / "steps.jsonl", run / "start_0001.yaml")}
    outcome = illada("train", *tiny_run, f"run_dir={run}", "training.train_steps=1")
    assert outcome.code == 0, outcome.err
    assert "finished at step 1 (training.train_steps 1; " in outcome.out
    assert "to go on, raise training.train_steps" in outcome.out
    assert "continues" not in outcome.out
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / "start_0002.yaml").exists()
    outcome = illada("train", *tiny_run, f"run_dir={run}", "training.exit_steps=1")
    assert "to go on, raise training.exit_steps" in outcome.out


@pytest.mark.parametrize("field", ["logging.jsonl_path", "logging.tensorboard_dir"])
def test_two_runs_do_not_share(
    field: str, run: Path, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    place = run / {"logging.jsonl_path": "steps.jsonl", "logging.tensorboard_dir": "tensorboard"}[field]
    before = (run / "steps.jsonl").read_bytes()
    refused = illada("train", *tiny_run, f"run_dir={tmp_path / 'other'}", f"{field}={place}")
    assert refused.code == 2
    assert f"{field} {place} belongs to another run, {run / 'checkpoints'}; this one is" in refused.err
    assert (run / "steps.jsonl").read_bytes() == before
    assert not (tmp_path / "other").exists()


def test_a_copy_and_a_moved_run_go_on_under_their_new_names(
    run: Path, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """Each with its own log and curves; the original keeps its own."""
    before = (run / "steps.jsonl").read_bytes()
    shutil.copytree(run, tmp_path / "copy")
    for here in ("copy", "moved"):
        place = tmp_path / here
        if here == "moved":
            (tmp_path / "copy").rename(place)
        steps = 2 if here == "copy" else 3
        outcome = illada("train", *tiny_run, f"run_dir={place}", f"training.exit_steps={steps}")
        assert outcome.code == 0, outcome.err
        lines = read_steps(place / "steps.jsonl")
        assert [one["step"] for one in lines if "loss" in one] == list(range(1, steps + 1))
        assert not list(place.glob("steps.jsonl.*"))
        assert (place / "tensorboard" / RUN_NAME_FILE).read_text().strip() == str(place / "checkpoints")
    assert (run / "steps.jsonl").read_bytes() == before


@pytest.mark.parametrize("field", ["run_dir", "checkpoint.save_dir", "logging.tensorboard_dir", "logging.jsonl_path"])
def test_a_path_that_cannot_be_written_is_said_before_anything_is_read(
    field: str, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "below"
    outcome = illada("train", *tiny_run, "data.train_paths=[nowhere]", f"{field}={place}")
    assert outcome.code == 2
    assert f"{field} {place}: cannot be written: {tmp_path / 'file'} is a file, expected a directory" in outcome.err


def test_weights_and_biases_offline(tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """Both starts of a run are one run there, in files of the run's folder, without a network."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    arguments = [*tiny_run, f"run_dir={run}", "logging.wandb_project=p", "logging.wandb_mode=offline"]
    for more in ("training.exit_steps=1", "validation.interval_steps=1"):
        outcome = illada("train", *arguments, more)
        assert outcome.code == 0, outcome.err
        assert "without Weights & Biases" not in outcome.out
    name = (run / ID_FILE).read_text().split()[0]
    first, second = sorted((run / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    for word in (b"loss/nats_per_token", b"t_sampling"):
        assert word in first.read_bytes()
    assert b"validation/bound_nats_per_token" in second.read_bytes()
    shutil.copytree(run, tmp_path / "copy")  # another run from here on
    copied = [one if one != f"run_dir={run}" else f"run_dir={tmp_path / 'copy'}" for one in arguments]
    assert illada("train", *copied, "training.train_steps=4").code == 0
    other = (tmp_path / "copy" / ID_FILE).read_text().split()[0]
    assert other != name
    assert list((tmp_path / "copy").glob(f"wandb/offline-run-*-{other}"))


def test_without_the_package_of_weights_and_biases(
    run: Path, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error where a run begins, a warning where one goes on."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = [*tiny_run, "logging.wandb_project=p", "training.exit_steps=2"]
    refused = illada("train", *arguments, f"run_dir={tmp_path / 'new'}")
    assert refused.code == 2
    assert "pip install wandb" in refused.err
    outcome = illada("train", *arguments, f"run_dir={run}")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("the run goes on without Weights & Biases") == 1


def test_whatever_weights_and_biases_raises_ends_no_run(
    run: Path, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["login = lambda prompt: True", "def Settings(**_): raise RuntimeError('no service')", "init = None", ""]
    (tmp_path / "wandb.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    outcome = illada("train", *tiny_run, f"run_dir={run}", "logging.wandb_project=p")
    assert outcome.code == 0, outcome.err
    assert "warning: logging.wandb_project p: no service; the run goes on without Weights & Biases" in outcome.out
    assert json.loads((run / "steps.jsonl").read_text().splitlines()[-1])["step"] == 3
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_nobody_is_asked_for_a_key(
    run: Path, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wandb.init` would ask the terminal, and rank 0 would wait for ever."""
    (tmp_path / "wandb.py").write_text("def login(prompt): return prompt\ndef init(**_): raise SystemExit(9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    outcome = illada("train", *tiny_run, f"run_dir={run}", "logging.wandb_project=p")
    assert outcome.code == 0, outcome.err
    assert "nobody is logged in" in outcome.out


def test_a_copy_of_a_start_is_no_start(run: Path, tmp_path: Path) -> None:
    """Somebody has copied start_0001.yaml to change it."""
    for name in ("start_0002.yaml", "start_0010.yaml", "start_0010_lr.yaml", "start_x.yaml"):
        (tmp_path / name).write_text("{}")
    config = load_config("tiny", [f"run_dir={tmp_path}"])
    written = write_start(config, 1)
    assert written == tmp_path / "start_0011.yaml"
    assert newest_start(tmp_path) == written


def test_names_of_one_run() -> None:
    assert same_run("s3://b/p/", "s3://b/p")
    assert same_run("runs/../runs/x/", "runs/x")
    assert not same_run("s3://b/p", "s3://b/q")
    assert not same_run("runs/x", "runs/y")
    assert is_own(Path("runs/copy/log"), "/elsewhere/checkpoints", "runs/copy/checkpoints")
    assert not is_own(Path("runs/a/log"), "runs/a/checkpoints", "runs/b/checkpoints")
    assert not is_own(Path("runs/log"), "runs/a", "runs/b")
    assert not is_own(Path("runs/a/log"), "runs/a/checkpoints", "runs/checkpoints")  # one in the other's folder
    assert not is_own(Path("runs/logs/log"), "runs/a/checkpoints", "runs/checkpoints")

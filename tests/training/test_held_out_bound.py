"""The held-out bound as users meet it: it belongs to the model alone, each text has its own, and no kill loses it."""

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from corpus import write_corpus
from launch import Illada, launch, run_warm

from illada_megatron.checkpoint.store import _own_checksum


def _evaluated(illada: Illada, path: Path, *arguments: object) -> dict[str, Any]:
    outcome = illada("evaluate", *arguments, "--json", path)
    assert outcome.code == 0, outcome.err
    return json.loads(path.read_text())


def test_the_noise_of_training_has_no_part_in_it(two_steps: Path, tmp_path: Path, illada: Illada) -> None:
    """Two runs of other noise are to differ by their models: 7.59 and 7.67 were one model's."""
    plain = _evaluated(illada, tmp_path / "plain.json", "--checkpoint", two_steps)
    other = _evaluated(
        *(illada, tmp_path / "other.json", "--checkpoint", two_steps, "diffusion.split_probability=1.0"),
        *("diffusion.t_sampling=uniform", "diffusion.mask_sampling=bernoulli", "diffusion.eps=0.3", "training.seed=9"),
    )
    assert other == plain
    reseeded = _evaluated(illada, tmp_path / "seed.json", "--checkpoint", two_steps, "validation.seed=9")
    assert reseeded["samples"] != plain["samples"]


def test_each_text_has_its_figures(two_steps: Path, tmp_path: Path, illada: Illada) -> None:
    """The second of two paths counted only where the first was too short; with another beside it, a text's figures
    stay."""
    places = [write_corpus(tmp_path / name) for name in ("web", "code")]
    samples = ["--checkpoint", two_steps, "validation.evaluate_samples=8"]
    both = _evaluated(illada, tmp_path / "both.json", *samples, f"data.validation_paths=[{places[0]},{places[1]}]")
    alone = _evaluated(illada, tmp_path / "web.json", *samples, f"data.validation_paths=[{places[0]}]")
    assert list(both["texts"]) == ["web", "code"]
    assert both["texts"]["web"] == alone["texts"]["web"]
    values = [both["texts"][name]["nats_per_token"]["value"] for name in ("web", "code")]
    assert values[0] != values[1]  # other windows and masks of the same text
    assert both["mean"]["nats_per_token"]["value"] == pytest.approx(sum(values) / 2)
    each = both["samples"]["code"]
    assert sum(each["nats_per_token"]) / 8 == pytest.approx(values[1])
    assert each["window"] == sorted(each["window"])
    assert "data.tokenizer_path is not set" in both["bytes_unknown"]


def test_a_killed_evaluation_goes_on(two_steps: Path, tmp_path: Path, illada: Illada) -> None:
    """With another number of ranks, too, and to the figures of one that nobody killed."""
    file, partial = tmp_path / "bound.json", tmp_path / "bound.json.partial"
    many = ["--checkpoint", two_steps, "validation.evaluate_samples=600"]

    def kill(launcher: psutil.Process) -> None:
        while not (partial.exists() and json.loads(partial.read_text())["done"] > 60):
            assert launcher.status() != psutil.STATUS_ZOMBIE
            time.sleep(0.01)
        launcher.kill()

    launch("evaluate", [*many, "--json", file], interrupt=kill)
    done = json.loads(partial.read_text())["done"]
    assert 60 < done < 600
    assert not file.exists()
    outcome = run_warm("evaluate", [*many, "--json", file], nproc=2)
    assert outcome.process.returncode == 0, outcome.output
    assert f"goes on from {partial}, after sample {done} of 600" in outcome.process.stdout
    assert not partial.exists()
    resumed, whole = json.loads(file.read_text()), _evaluated(illada, tmp_path / "whole.json", *many)
    (ours,), (theirs,) = (list(one["samples"].values()) for one in (resumed, whole))
    assert ours["window"] == theirs["window"]
    assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], rel=1e-5)


def test_what_another_evaluation_left_is_not_taken(two_steps: Path, tmp_path: Path, illada: Illada) -> None:
    """Of another checkpoint, or damaged."""
    file, partial = tmp_path / "bound.json", tmp_path / "bound.json.partial"
    plain = _evaluated(illada, file, "--checkpoint", two_steps)
    for left, said in (
        (json.dumps({"of": {"step": 1}, "done": 3}), "is of another evaluation, and is written anew"),
        ('{"of": ', "is damaged"),
    ):
        partial.write_text(left)
        outcome = illada("evaluate", "--checkpoint", two_steps, "--json", file)
        assert said in outcome.out
        assert json.loads(file.read_text()) == plain
        assert not partial.exists()


def test_a_run_that_held_out_the_tail_is_refused(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """Its order is another one, and what is held out now it has trained on."""
    arguments = [*tiny_run, "data.validation_paths=[]", "data.holdout_tokens=1000", "validation.interval_steps=1"]
    arguments += [f"checkpoint.save_dir={tmp_path / 'run'}"]
    outcome = illada("train", *arguments, "training.exit_steps=1")
    assert outcome.code == 0, outcome.err
    assert "held-out bound" in outcome.out
    record = tmp_path / "run" / "step_00000001" / "checkpoint.json"
    content = json.loads(record.read_text())
    assert content["fingerprints"]["data"].pop("held_out") == {"": "16 ranges of 62 tokens, spread evenly"}
    del content["checksum"]
    record.write_text(json.dumps({**content, "checksum": _own_checksum(content)}))
    outcome = illada("train", *arguments)
    assert outcome.code == 2
    assert "data.held_out was None" in outcome.err
    assert "older versions held out the last tokens of each corpus" in outcome.err


def test_what_was_trained_on_is_not_held_out(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """Other tokens, or other ranges of them, than the run left out are ones that it was trained on."""
    runs, other = tmp_path / "run", write_corpus(tmp_path / "other", copies=2)
    held_out = ("data.validation_paths=[]", "data.holdout_tokens=640")
    outcome = illada("train", *tiny_run, *held_out, f"checkpoint.save_dir={runs}")
    assert outcome.code == 0, outcome.err
    assert illada("evaluate", "--checkpoint", runs).code == 0
    for changed in ("data.holdout_tokens=1280", f"data.train_paths=[{other}]"):
        refused = illada("evaluate", "--checkpoint", runs, changed)
        assert refused.code == 2
        assert "the run that saved it read something else" in refused.err
        allowed = illada("evaluate", "--checkpoint", runs, changed, 'checkpoint.allow_mismatch=["data"]')
        assert allowed.code == 0, allowed.err
        assert "(allowed)" in allowed.out
    trained = next(one for one in tiny_run if one.startswith("data.train_paths=")).partition("=")[2]
    seen = illada("evaluate", "--checkpoint", runs, "data.holdout_tokens=0", f"data.validation_paths={trained}")
    assert seen.code == 2
    assert "this validation shard is the training shard" in seen.err
    gone = illada("evaluate", "--checkpoint", runs, "data.holdout_tokens=0", f"data.validation_paths=[{other}]")
    assert gone.code == 0, gone.err

"""What training reads does not depend on how it is stored or laid out: shards, blends, phases, documents, loaders."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpus import write_corpus
from launch import SMALL, Illada, TrainOnce, run_warm
from test_layouts import PP4, RELATIVE, assert_same_training

from illada_megatron.data.shards.indexed_dataset import IndexedDataset, IndexedDatasetWriter

TEN_STEPS = "training.exit_steps=10"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("whole") / "corpus")


@pytest.fixture(scope="module")
def halves(whole: Path) -> dict[str, Path]:
    """The same text as two corpora."""
    dataset = IndexedDataset(whole)
    tokens, cut = dataset.read(0, dataset.num_tokens), dataset.num_tokens // 3
    paths = {name: whole.with_name(name) for name in ("web", "code")}
    for path, piece in zip(paths.values(), (tokens[:cut], tokens[cut:]), strict=True):
        lengths = np.diff([*range(0, len(piece), 50), len(piece)])  # documents of 50 tokens, windows of 32
        with IndexedDatasetWriter(path, 250) as writer:
            writer.add(piece, lengths)
    return paths


def _blend(halves: dict[str, Path]) -> tuple[str, ...]:
    entries = ",".join(
        f"{{name: {name}, paths: ['{path}'], weight: {weight}}}"
        for (name, path), weight in zip(halves.items(), (0.7, 0.3), strict=True)
    )
    phases = "[{from_tokens: 1600, weights: {web: 0.1, code: 0.9}}]"  # after sample 50, in the middle of step 7
    return (
        *(f"data.blend=[{entries}]", f"data.phases={phases}", "data.train_paths=[]", "data.validation_paths=[]"),
        *("data.holdout_tokens=1000", "diffusion.attention_boundary=document"),
    )


def test_losses_do_not_depend_on_the_number_of_shards(whole: Path, tmp_path: Path) -> None:
    """One shard or 50, whose ends are no ends of documents or windows."""
    dataset = IndexedDataset(whole)
    for number, piece in enumerate(np.array_split(dataset.read(0, dataset.num_tokens), 50)):
        with IndexedDatasetWriter(tmp_path / f"part_{number:02d}", 250) as writer:
            writer.add(piece, [len(piece)])
    losses = []
    for name, path in (("one", whole), ("fifty", tmp_path / "part_*")):
        run = run_warm("train", [*SMALL, f"data.train_paths=[{path}]", TEN_STEPS], 1, tmp_path / f"{name}.jsonl")
        assert run.process.returncode == 0, run.output
        losses.append([(step["loss"], step["grad_norm"]) for step in run.steps])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


def test_blend_with_phases_and_documents_in_every_layout(
    halves: dict[str, Path], train_once: TrainOnce, tmp_path: Path
) -> None:
    """PP4 has stages without tokens, which find the documents in the .idx; two ranks read every second sample."""
    one = train_once(1, *_blend(halves), TEN_STEPS)
    for nproc, layout in ((4, (PP4,)), (2, ())):
        assert_same_training(train_once(nproc, *layout, *_blend(halves), TEN_STEPS).steps, one.steps, RELATIVE)
    assert "share 70.00% -> 10.00%" in one.output
    assert "blend changes" in one.output
    samples = {name: one.steps[-1]["epochs"][name] * (_tokens(path) - 1000 - 31) for name, path in halves.items()}
    # 50 of 80 samples in the first phase: 35 + 15; 30 in the second: 3 + 27
    assert samples["web"] / 32 == pytest.approx(38, rel=0.02)
    assert samples["code"] / 32 == pytest.approx(42, rel=0.02)


def _tokens(path: Path) -> int:
    return IndexedDataset(path).num_tokens


def test_blend_goes_on_where_it_stopped(halves: dict[str, Path], train_once: TrainOnce, tmp_path: Path) -> None:
    """Interrupted just before the phase changes: same layout, the same losses to the last bit."""
    jsonl, fields = tmp_path / "steps.jsonl", (*_blend(halves), f"checkpoint.save_dir={tmp_path / 'checkpoints'}")
    for exit_step in (6, 10):
        run = run_warm("train", [*SMALL, *fields, f"training.exit_steps={exit_step}"], 1, jsonl)
        assert run.process.returncode == 0, run.output
    whole = train_once(1, *_blend(halves), TEN_STEPS)
    assert [step["loss"] for step in run.steps] == [step["loss"] for step in whole.steps]


def test_loader_settings_change_nothing(tiny_run: tuple[str, ...], illada: Illada, tmp_path: Path) -> None:
    losses = []
    for number, (threads, depth) in enumerate(((1, 1), (4, 16))):
        jsonl = tmp_path / f"{number}.jsonl"
        fields = (f"data.loader_threads={threads}", f"data.prefetch_microbatches={depth}")
        outcome = illada("train", *tiny_run, *fields, f"logging.jsonl_path={jsonl}")
        assert outcome.code == 0, outcome.err
        steps = [json.loads(line) for line in jsonl.read_text().splitlines()]
        assert all(0 <= step["data_wait_seconds"] <= step["seconds"] for step in steps)
        losses.append([step["loss"] for step in steps])
    assert losses[0] == losses[1]


def test_reading_too_often_is_known_at_start(tiny_run: tuple[str, ...], illada: Illada) -> None:
    """Before the first step: by step 300000 the corpus would be read more than twice."""
    fields = ("training.train_steps=300000", "data.max_epochs=2", "training.exit_steps=1")
    outcome = illada("train", *tiny_run, *fields)
    assert outcome.code == 2
    assert "data.train_paths would be read" in outcome.err
    assert "max_epochs is 2" in outcome.err
    outcome = illada("train", *tiny_run, *fields, "data.epoch_limit=warn")
    assert outcome.code == 0, outcome.err
    assert "warning: data.train_paths would be read" in outcome.out


def test_bad_token_in_a_loader_thread_ends_the_run_with_its_place(
    tiny_run: tuple[str, ...], illada: Illada, tmp_path: Path
) -> None:
    with IndexedDatasetWriter(tmp_path / "bad", 300) as writer:
        writer.add(np.array([*range(6, 206), 299] * 3, dtype=np.int32), [603])
    outcome = illada("train", *tiny_run, f"data.train_paths=[{tmp_path / 'bad'}]")
    assert outcome.code == 2
    assert "bad.bin: token id 299 at token offset" in outcome.err

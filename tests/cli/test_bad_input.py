"""What users get wrong: one message that names it, exit code 2, no traceback, nothing lost."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from launch import Illada, launch

from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter


def _shard(prefix: Path, tokens: Sequence[int], vocab_size: int = 250) -> Path:
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        writer.add(np.asarray(tokens, dtype=np.int64), np.array([len(tokens)]))
    return prefix


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 300 tokens that reserves id 5 for the mask."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.jsonl").write_text('{"text": "a few words for a small vocabulary"}\n' * 50)
    return train_sentencepiece([directory / "text.jsonl"], directory / "t.model", vocab_size=285)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=1", "training.learning_rate: unknown field"),
        ("training.lr=fast", "training.lr"),
        ("data.train_paths=[]", "data.train_paths and data.blend are empty"),
        ("data.train_paths=[/nowhere/shard]", "/nowhere/shard"),
        ("data.train_paths=['/nowhere/*']", "/nowhere/*: no shard matches this glob"),
        ("data.sequence_length=64 model.max_sequence_length=32", "data.sequence_length 64 is above"),
        ("parallel.tensor_model_parallel_size=2", "world size 1 is not a multiple of tensor * pipeline"),
        ("runtime.transformer_impl=transformer_engine", "transformer_engine needs a GPU"),
        ("data.tokenizer_path=/nowhere/t.model", "/nowhere/t.model"),
        ("validation.interval_steps=1 data.validation_paths=[]", "data.validation_paths is empty"),
        ("logging.jsonl_path=/proc/none/steps.jsonl", "/proc/none"),
    ],
)
def test_configuration(override: str, message: str, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    save_dir = tmp_path / "checkpoints"
    outcome = illada("train", *tiny_run, *override.split(), f"checkpoint.save_dir={save_dir}")
    assert outcome.code == 2, outcome
    assert "illada: error: " in outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(save_dir.glob("step_*"))


def test_tokenizer_that_masks_with_another_id(tokenizer_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """The model would be trained to treat a word as the mask."""
    settings = [f"data.tokenizer_path={tokenizer_path}", "model.vocab_size=300"]
    outcome = illada("train", *tiny_run, *settings, "model.mask_token_id=4")
    assert outcome.code == 2
    assert f"{tokenizer_path} reserves id 5 for the mask, model.mask_token_id is 4" in outcome.err
    assert "set model.mask_token_id=5" in outcome.err
    assert illada("train", *tiny_run, *settings, "training.exit_steps=1").code == 0


def test_tokenizer_larger_than_the_model(tokenizer_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    outcome = illada("train", *tiny_run, f"data.tokenizer_path={tokenizer_path}")
    assert outcome.code == 2
    assert f"{tokenizer_path} has 285 tokens, model.vocab_size is 250" in outcome.err


def test_generate_with_the_tokenizer_of_another_model(tokenizer_path: Path, two_steps: Path, illada: Illada) -> None:
    outcome = illada("generate", "--checkpoint", two_steps, "--tokenizer", tokenizer_path, "--prompt", "a few")
    assert outcome.code == 2
    assert f"{tokenizer_path} has 285 tokens and mask 5, the checkpoint's model 250 ids and mask" in outcome.err


def test_id_outside_the_vocabulary(tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """Found when it is read, in the middle of training: the shard and the offset are named, the checkpoint before it
    stays."""
    tokens = 6 + np.arange(400) % 200
    tokens[333] = 260
    shard = _shard(tmp_path / "shard", tokens, vocab_size=1000)
    save_dir = tmp_path / "checkpoints"
    settings = [f"data.train_paths=[{shard}]", "data.shuffle=false", f"checkpoint.save_dir={save_dir}"]
    outcome = illada("train", *tiny_run, *settings, "checkpoint.interval_steps=1")
    assert outcome.code == 2
    for part in (str(shard), "333", "260", "250"):
        assert part in outcome.err, part
    assert (save_dir / "latest").read_text() == "step_00000002\n"  # samples 8 to 11 would have been step 3


def test_corpus_that_contains_the_mask(tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    tokens = 6 + np.arange(400) % 200
    tokens[3] = 5
    settings = [f"data.train_paths=[{_shard(tmp_path / 'shard', tokens)}]", "data.shuffle=false"]
    outcome = illada("train", *tiny_run, *settings)
    assert outcome.code == 2
    assert "sample 0 contains the mask token 5 at position 3" in outcome.err


def test_corpus_shorter_than_a_sequence(tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    outcome = illada("train", *tiny_run, f"data.train_paths=[{_shard(tmp_path / 'shard', [7] * 31)}]")
    assert outcome.code == 2
    assert "31 tokens in all, expected at least one window of 32" in outcome.err


def test_loss_that_is_not_a_number(tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """The run stops at that step, names its samples, and does not save the ruined weights."""
    save_dir, jsonl = tmp_path / "checkpoints", tmp_path / "steps.jsonl"
    settings = [f"checkpoint.save_dir={save_dir}", "checkpoint.interval_steps=1", "schedule.warmup_steps=0"]
    first = illada("train", *tiny_run, *settings, "training.exit_steps=1")
    assert first.code == 0, first.err
    before = {path: path.read_bytes() for path in (save_dir / "step_00000001").iterdir()}
    outcome = illada(
        "train", *tiny_run, *settings, "training.lr=1e30", "faults.max_bad_steps=1", f"logging.jsonl_path={jsonl}"
    )
    assert outcome.code == 3
    assert "step 3: the loss is" in outcome.err  # step 2 makes the weights huge, step 3's gradient is not a number
    assert "samples 8 to 11)" in outcome.err
    assert "a lower training.lr" in outcome.err
    assert {path: path.read_bytes() for path in (save_dir / "step_00000001").iterdir()} == before
    assert not (save_dir / "step_00000003").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(FileNotFoundError(2, "No such file", "x"), 2), (ConnectionResetError("reset"), 1), (OSError(5, "I/O error"), 1)],
)
def test_errors_of_the_system(error: OSError, code: int, illada: Illada, monkeypatch: pytest.MonkeyPatch) -> None:
    """2: the launcher gives up; 1: it tries again, the disk or the network may be back."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("illada_megatron.cli.run_commands.load_config", fail)
    outcome = illada("train")
    assert (outcome.code, outcome.err) == (code, f"illada: error: {error}\n")


def test_error_on_several_ranks_is_shown_once(tiny_run: tuple[str, ...]) -> None:
    """Real ranks: the launcher passes the code on and adds no traceback of its own."""
    run = launch("train", [*tiny_run, "data.train_paths=[/nowhere/shard]"], nproc=2)
    assert run.process.returncode == 2, run.output
    assert "illada: error" in run.process.stderr
    assert "/nowhere/shard" in run.process.stderr
    assert "Traceback" not in run.output
    refused = launch("train", [*tiny_run, "parallel.data_parallel_size=4"], nproc=2)
    assert refused.process.returncode == 2
    assert "start 4 ranks or change it" in refused.process.stderr
    assert "Traceback" not in refused.output

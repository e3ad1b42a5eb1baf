"""`illada translate`, and Megatron's options where `illada` has fields."""

import io
import shlex
from pathlib import Path

import pytest
import yaml
from launch import Illada

from illada_megatron.config import load_config
from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece

SCRIPT = """#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS=8
NODES=${NODES:-4}
CHECKPOINTS=$1 # where
DATA=$2/mine_text_document
LAUNCH="
    --nproc_per_node $GPUS \\
    --nnodes $NODES
"
MODEL=(
    --num-layers 4 --hidden-size 256
    # --num-layers 40
    --num-attention-heads 8 --seq-length 512 --max-position-embeddings 512 # short
)
TRAINING=(--micro-batch-size 1 --global-batch-size 64 --lr 1e-3 --train-iters 100 --bf16)
if [ -n "$FP8" ]; then
    TRAINING+=(--fp4-format e2m1)
fi
torchrun $LAUNCH pretrain_gpt.py \\
    "${MODEL[@]}" \\
    ${TRAINING[@]} \\
    --save "$CHECKPOINTS" --load "$CHECKPOINTS" --data-path $DATA \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model $TOKENIZER
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train my model.sh"
    path.write_text(SCRIPT)
    return path


def test_a_script_with_its_arguments(script: Path, tmp_path: Path, illada: Illada) -> None:
    """The vocabulary and the mask are the tokenizer's, whose file is there."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "line {number} of a text that is long enough"}}\n' for number in range(300)))
    model = train_sentencepiece([text], tmp_path / "t.model", vocab_size=300)
    outcome = illada("translate", script, "runs/a b", "/data", f"TOKENIZER={model}")
    assert outcome.code == 0, outcome.err
    config = load_config(yaml.safe_load(outcome.out))
    assert (config.checkpoint.save_dir, config.checkpoint.load_dir) == ("runs/a b", None)
    assert config.data.train_paths == ["/data/mine_text_document"]
    assert config.data.tokenizer_path == str(model)
    assert (config.model.num_layers, config.model.vocab_size, config.model.mask_token_id) == (4, 300, 5)
    assert "`if` is not decided" in outcome.err
    assert "\nnot supported:\n  --fp4-format e2m1: " in outcome.err
    assert "start it with: illada train --nproc 8 --nnodes 4 --rdzv-endpoint HOST:29500 --config FILE" in outcome.err
    (tmp_path / "my.yaml").write_text(outcome.out)
    dry = illada("train", "--config", tmp_path / "my.yaml", "--dry-run", "runtime.device=cpu")
    assert dry.code == 0, dry.err


def test_a_script_without_them(script: Path, illada: Illada) -> None:
    outcome = illada("translate", script, "NODES=2")
    assert outcome.code == 2
    for part in ("--save $1", "--data-path $2/mine_text_document", "--tokenizer-model $TOKENIZER", "NAME=VALUE"):
        assert part in outcome.err


LINE = (
    "torchrun --nproc_per_node 2 pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 "
    "--seq-length 128 --micro-batch-size 2 --lr 1e-3 --train-iters 10 "
    "--data-path 0.3 a 0.7 b --vocab-size 1000 --no-such-thing 1"
)


def test_a_command_line_typed_pasted_or_piped(illada: Illada, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = illada("translate", *shlex.split(LINE))
    pasted = illada("translate", LINE)
    monkeypatch.setattr("sys.stdin", io.StringIO(LINE + "\n"))
    piped = illada("translate", "-")
    behind_dashes = illada("translate", "--", *shlex.split(LINE))
    assert typed.code == 0, typed.err
    assert typed.out == pasted.out == piped.out == behind_dashes.out
    config = load_config(yaml.safe_load(typed.out))
    assert [entry.weight for entry in config.data.blend] == [0.3, 0.7]
    assert config.training.global_batch_size == 4  # 2 ranks
    assert "  --no-such-thing\n" in typed.err


def test_options_alone(illada: Illada) -> None:
    outcome = illada("translate", *shlex.split(LINE)[4:])
    assert outcome.code == 2
    assert "lacks --global-batch-size" in outcome.err


@pytest.mark.parametrize("words", [("nowhere.sh",), ("nowhere.sh", "out", "data")])
def test_no_such_script(words: tuple[str, ...], illada: Illada) -> None:
    outcome = illada("translate", *words)
    assert outcome.code == 2
    assert "nowhere.sh: no such file" in outcome.err


def test_a_file_that_is_no_script(tmp_path: Path, illada: Illada) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    assert "expected a shell script, found no text" in illada("translate", tmp_path / "a").err
    (tmp_path / "b").write_text("echo hello\n")
    outcome = illada("translate", tmp_path / "b")
    assert (outcome.code, "no command with options in it" in outcome.err) == (2, True)


# what is typed behind `illada train` -> words of the error
TYPED = {
    "--tensor-model-parallel-size 2": "write parallel.tensor_model_parallel_size=2",
    "--tensor_model_parallel_size=2": "write parallel.tensor_model_parallel_size=2",
    "--data-path my_text_document": "write data.train_paths=[my_text_document]",
    "--data-path 0.3 a 0.7 b": "write 'data.blend=[{name: a, paths: [a], weight: 0.3}, {name: b, paths: [b], ",
    "--sequence-parallel": "write parallel.sequence_parallel=true",
    "--lr 1e-4": "write training.lr=1e-4",
    "--save runs/x": "write checkpoint.save_dir=runs/x",
    "--save-dir runs/x": "write checkpoint.save_dir=runs/x",
    "--learning-rate 1e-4": "write training.lr=1e-4",
    "--num-experts 8": "--num-experts is not supported: no experts",
    "--swiglu": "--swiglu has no field here: always so",
}


@pytest.mark.parametrize("typed", TYPED)
def test_a_field_typed_as_an_option(typed: str, illada: Illada) -> None:
    outcome = illada("train", "--config", "tiny", *typed.split())
    assert outcome.code == 2
    assert f"{typed.split()[0].split('=')[0]}: fields are given as section.field=value; " in outcome.err
    assert TYPED[typed] in outcome.err


def test_an_option_of_nobodys(illada: Illada) -> None:
    outcome = illada("train", "--config", "tiny", "--no-such-thing", "1")
    assert outcome.code == 2
    assert "No such option" in outcome.err

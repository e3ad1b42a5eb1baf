"""From a Llama of transformers and its tokenizer, which has no mask, to a trained model that transformers loads: only
with what the commands print and write."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from launch import Illada
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from illada_megatron.checkpoint.hugging_face.importing import open_source
from illada_megatron.config import load_config
from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

SOURCES = sorted((Path(__file__).parents[3] / "illada_megatron" / "data").rglob("*.py"))


def _llama(folder: Path, rows: int) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes, **heads)).save_pretrained(folder)
    return folder


def _tokenizer(path: Path, ids: int) -> Path:
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    tokenizer.train([str(one) for one in SOURCES], vocab_size=ids, special_tokens=special, show_progress=False)
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in SOURCES))
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer.json of 500 ids, without a mask."""
    return _tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json", 500).parent


@pytest.mark.parametrize("rows", [500, 640])
def test_all_the_way(rows: int, corpus: Path, words: Path, tmp_path: Path, illada: Illada) -> None:
    """500 rows: the mask's is a new one. 640: the model has rows that its tokenizer does not use, as Qwen2 has."""

    def done(*arguments: object) -> str:
        outcome = illada(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    llama, masked, start = _llama(tmp_path / "llama", rows), tmp_path / "masked", tmp_path / "start"
    done("tokenizer", "add-mask", words, "--output", masked)
    done("preprocess", corpus, "--output-prefix", tmp_path / "shard", "--tokenizer", masked)
    out = done("convert", "from-hf", llama, start, f"data.tokenizer_path={masked}", "training.micro_batch_size=2")
    assert f"{start / 'train.yaml'}: to train on, illada train --config {start / 'train.yaml'}" in out
    written = load_config(start / "train.yaml")
    assert (written.model.mask_token_id, written.model.vocab_size) == (500, max(rows, 501))
    assert (written.checkpoint.load_dir, written.training.micro_batch_size) == (str(start), 2)
    assert Path(written.data.tokenizer_path or "").samefile(masked)
    # all of the model, and of the rest what is not a default
    assert yaml.safe_load((start / "train.yaml").read_text())["training"] == {
        "precision": "fp32",
        "micro_batch_size": 2,
    }
    settings = (
        *(f"data.train_paths=[{tmp_path / 'shard'}]", "data.holdout_tokens=2000", "validation.num_samples=4"),
        *("training.train_steps=3", "training.global_batch_size=4", "validation.interval_steps=2"),
        *("schedule.warmup_steps=0", "runtime.device=cpu", "runtime.num_threads=1"),
    )
    out = done("train", "--config", start / "train.yaml", *settings, f"checkpoint.save_dir={tmp_path / 'run'}")
    assert "begins with the weights of" in out
    assert ("other rows of the embedding" in re.sub(r"\s+", " ", out)) == (rows == 640)
    assert "held-out bound" in done("evaluate", "--checkpoint", tmp_path / "run")
    for checkpoint in (start, tmp_path / "run"):
        done("generate", "--checkpoint", checkpoint, "--prompt", "def f(", "--gen-length", 24, "--plain")
        # a model that would rather have the rows that no word stands for
        done("generate", "--checkpoint", checkpoint, "--prompt", "x <mask:4> y", "--temperature", 5, "--plain")
    done("convert", "to-hf", tmp_path / "run", tmp_path / "hf", "--verify", "--license", "apache-2.0")
    model = AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (model.config.mask_token_id, model.config.vocab_size) == (500, max(rows, 501))
    assert (loaded.mask_token_id, loaded.mask_token) == (500, "<|mask|>")
    _check_card(tmp_path / "hf" / "README.md", tmp_path)


def _check_card(path: Path, folder: Path) -> None:
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["illada", "masked-diffusion", "diffusion-language-model", "custom_code"]
    text = " ".join(card.text.split())
    assert re.search(r"\| Tokens \| [\d,]+ \(12 sequences of 64\)", text), text
    assert re.search(r"\| Held-out bound \| \d\.\d{4} nats/token at step 2, over 256 tokens", text)
    assert re.search(r"\| shard \| \d+ tokens, [0-9a-f]{16} \|", text)
    assert f"SHA-256 `{load_tokenizer(folder / 'masked').fingerprint}`" in text
    assert f"illada convert to-hf {folder / 'run'} {folder / 'hf'} --verify --license apache-2.0" in text


def test_card_without_what_is_not_known(tmp_path: Path, illada: Illada) -> None:
    """Imported weights: no steps, no data, and the license stays for whoever publishes."""
    assert illada("convert", "from-hf", _llama(tmp_path / "llama", 300), tmp_path / "start").code == 0
    arguments = ("convert", "to-hf", tmp_path / "start", tmp_path / "hf", "--no-tokenizer")
    outcome = illada(*arguments, "--license", "My License: 2")
    assert (outcome.code, "--license is 'My License: 2', expected one of the hub's" in outcome.err) == (2, True)
    outcome = illada(*arguments)
    assert outcome.code == 0, outcome.err
    assert "a license (--license), languages, use), then hf upload ORG/NAME" in outcome.out
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert card.data.license is None
    assert "none by this program" in card.text
    assert "does not say what data it was trained on" in card.text


def test_sizes_and_masks_that_do_not_fit(words: Path, tmp_path: Path, illada: Illada) -> None:
    llama = _llama(tmp_path / "llama", 400)
    with pytest.raises(DataError, match=r"tokenizer\.json: the tokenizer has 500 ids, the model's embedding has 401"):
        open_source(llama, None, [f"data.tokenizer_path={words}"])
    right = _llama(tmp_path / "right", 500)
    text = load_tokenizer(words).decode([300])
    with pytest.raises(DataError) as refused:
        open_source(right, None, [f"data.tokenizer_path={words}"], mask_token_id=300)
    assert f"model.mask_token_id is 300, the id that {words} gives to the text {text!r}" in str(refused.value)
    assert "illada tokenizer add-mask" in str(refused.value)
    # without a mask in the tokenizer the new row is the mask, and no text gives its id
    outcome = illada("convert", "from-hf", right, tmp_path / "start", f"data.tokenizer_path={words}")
    assert outcome.code == 0, outcome.err
    assert "none is needed" in outcome.out
    outcome = illada("convert", "from-hf", right, tmp_path / "start", f"data.tokenizer_path={words}")
    assert (outcome.code, "train.yaml: exists, and is not replaced: give another" in outcome.err) == (2, True)
    outcome = illada("convert", "from-hf", right, tmp_path / "other", "--config-out", tmp_path / "here" / "my.yaml")
    assert outcome.code == 0, outcome.err
    assert load_config(tmp_path / "here" / "my.yaml").checkpoint.load_dir == str(tmp_path / "other")
    # a run whose mask is a word
    configuration = ("train", "--config", tmp_path / "start" / "train.yaml", "model.mask_token_id=300")
    outcome = illada(*configuration, "data.train_paths=[nowhere]", "runtime.device=cpu")
    assert outcome.code == 2
    assert "model.mask_token_id is 300, the id that" in outcome.err

"""A model of random weights with a tokenizer, for what opens one."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from illada_megatron.checkpoint.hugging_face.exporting import export
from illada_megatron.checkpoint.predictor import find_checkpoint
from tests.checkpoint.random_weights import random_checkpoint, small_config

VOCABULARY = 1200
SIZES = (
    *("model.hidden_size=128", "model.ffn_hidden_size=192", f"model.vocab_size={VOCABULARY}", "model.num_layers=4"),
    *("model.max_sequence_length=256", "training.precision=fp32"),
)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, the same as a Hugging Face directory, a tokenizer."""
    folder = tmp_path_factory.mktemp("layers")
    words = Tokenizer(models.WordLevel({f"w{number} ": number for number in range(VOCABULARY)}, unk_token="w3 "))
    words.add_special_tokens([AddedToken("<mask>", special=True)])
    words.save(str(folder / "tokenizer.json"))
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["vocab"] = {("<mask>" if n == 5 else f"w{n} "): n for n in range(VOCABULARY)}
    definition["added_tokens"][0]["id"] = 5
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    random_checkpoint(folder / "run", small_config(*SIZES))
    export(find_checkpoint(folder / "run"), folder / "hf", "illada", "fp32")
    return folder

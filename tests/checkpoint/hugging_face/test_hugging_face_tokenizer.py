"""AutoTokenizer on an exported directory gives the ids that the run was trained on."""

import json
import shutil
from pathlib import Path

import pytest
from launch import Illada
from random_weights import random_checkpoint, small_config
from source_tokenizers import SOURCES, trained_sentencepiece
from transformers import AutoTokenizer

from illada_megatron.checkpoint.hugging_face.exporting import export
from illada_megatron.checkpoint.hugging_face.importing import open_source
from illada_megatron.checkpoint.hugging_face.tokenizer_files import tokenizer_files
from illada_megatron.checkpoint.predictor import find_checkpoint
from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.data.tokenizers.tokenizer import SPACE_SIGN, load_tokenizer

HARD = [
    "",
    " ",
    "def f(x):\n    return {'a': [1, 2.5], **x}  # ok?\n\n\tif a  and b:\r\n",
    "naïve café cafe\u0301 漢字かな 👩‍👩‍👧 مرحبا \u00a0\u3000",
    "  leading, trailing  and    runs   ",
    "0123456789" * 30,
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in SOURCES))
    return path


def _huggingface(path: Path) -> Path:
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|mdm_mask|>", "<pad>"]
    tokenizer.train([str(source) for source in SOURCES], vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.save(str(path))
    return path


def _tokenizer(kind: str, corpus: Path, folder: Path) -> Path:
    if kind == "ours":
        return train_sentencepiece([corpus], folder / "t.model", vocab_size=600)
    if kind == "tokenizer.json":
        return _huggingface(folder / "my_tokenizer.json")
    settings: dict[str, object] = {"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True}
    if kind == "pieces of the user":
        settings["user_defined_symbols"] = ["<|im_start|>", "==="]
    return trained_sentencepiece(folder / "t.model", remove_extra_whitespaces=kind != "as Llama's", **settings)


@pytest.mark.parametrize("kind", ["ours", "tokenizer.json", "as Llama's", "pieces of the user"])
def test_the_same_ids(kind: str, corpus: Path, tmp_path: Path) -> None:
    path = _tokenizer(kind, corpus, tmp_path)
    words = load_tokenizer(path)
    vocabulary = f"model.vocab_size={words.vocab_size}"
    config = small_config(vocabulary, f"model.mask_token_id={5 if words.mask_id is None else words.mask_id}")
    random_checkpoint(tmp_path / "run", config)
    files = tokenizer_files(path, 64, config.model.mask_token_id)
    export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", "illada", tokenizer=files)
    shutil.rmtree(tmp_path / "run")
    path.unlink()

    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for text in [*HARD, *(source.read_text().replace(SPACE_SIGN, "") for source in SOURCES)]:
        ids = loaded(text, split_special_tokens=text not in HARD)["input_ids"]  # the sources spell special tokens
        assert ids == words.encode(text)
        assert loaded.decode(ids) == words.decode(ids)
    assert len(loaded) == words.vocab_size
    assert loaded.model_max_length == 64
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.mask_token_id) == (
        words.bos_id,
        words.eos_id,
        words.mask_id,
    )
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (values["eos_token_id"], values["pad_token_id"]) == (words.eos_id, loaded.pad_token_id)
    # what comes back is read by this program with the same ids
    again = load_tokenizer(open_source(tmp_path / "hf").config.data.tokenizer_path or "")
    assert [again.encode(text) for text in HARD] == [words.encode(text) for text in HARD]


def test_special_tokens_and_the_chat_template(corpus: Path, tmp_path: Path) -> None:
    """To transformers the name of a special token in a text is that token; asked to split it, it does as we do."""
    path = _tokenizer("ours", corpus, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}<sep>"}')
    for name, content in tokenizer_files(path, 64, 5).files.items():
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / name).write_bytes(content)
    loaded, words = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(path)
    assert loaded("a<mask></s>")["input_ids"][-2:] == [5, words.eos_id]
    assert loaded("a<mask></s>", split_special_tokens=True)["input_ids"] == words.encode("a<mask></s>")
    assert loaded.decode([5, 2], skip_special_tokens=True) == ""
    rendered = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "hi<sep>"
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == path.read_bytes()


def test_what_would_give_other_ids_is_refused(
    corpus: Path, tmp_path: Path, illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    unigram = trained_sentencepiece(tmp_path / "u.model", model_type="unigram", normalization_rule_name="identity")
    normalising = trained_sentencepiece(tmp_path / "n.model", model_type="bpe")
    for path in (unigram, normalising):
        with pytest.raises(DataError, match="the same ids only for a SentencePiece model of BPE"):
            tokenizer_files(path, 64, 5)
    ours = _tokenizer("ours", corpus, tmp_path)
    monkeypatch.setattr("illada_megatron.checkpoint.hugging_face.tokenizer_files._normalizer", lambda _: None)
    with pytest.raises(DataError, match="other ids than SentencePiece from token 0 on"):
        tokenizer_files(ours, 64, 5)
    random_checkpoint(tmp_path / "run", small_config())
    outcome = illada("convert", "to-hf", tmp_path / "run", tmp_path / "hf", "--tokenizer", unigram)
    assert outcome.code == 2
    assert "leave the tokenizer out with --no-tokenizer" in outcome.err
    outcome = illada("convert", "to-hf", tmp_path / "run", tmp_path / "hf")
    assert outcome.code == 2
    assert "the run names no data.tokenizer_path: give --tokenizer" in outcome.err
    assert not (tmp_path / "hf").exists()

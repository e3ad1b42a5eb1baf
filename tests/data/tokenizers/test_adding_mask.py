"""A tokenizer that gets a mask token gives all text the ids that it gave before, and nothing else changes."""

import io
import json
from pathlib import Path

import pytest
import tokenizers
from launch import Illada

from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.adding_mask import add_mask
from illada_megatron.data.tokenizers.engine_probes import probe_texts
from illada_megatron.data.tokenizers.fitting import check_mask, text_of
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

KINDS = ["json", "json with added tokens", "bpe.model", "unigram.model"]


def _without_mask(kind: str, texts: list[str], folder: Path) -> Path:
    if kind.startswith("json"):
        tokenizer = tokenizers.ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts, vocab_size=700, special_tokens=["<|endoftext|>"], show_progress=False)
        if kind != "json":
            tokenizer.add_tokens(["def ", "self."])  # behind the vocabulary, as published tokenizers have them
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder / "tokenizer.json"
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()[:4000]),
        model_writer=model,
        vocab_size=600,
        model_type=kind.removesuffix(".model"),
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder / "tokenizer.model"


@pytest.mark.parametrize("kind", KINDS)
def test_text_keeps_its_ids(kind: str, texts: list[str], tmp_path: Path) -> None:
    path = _without_mask(kind, texts, tmp_path)
    before = load_tokenizer(path)
    assert before.mask_id is None
    made = add_mask(tmp_path, tmp_path / "new")
    after = load_tokenizer(tmp_path / "new")
    assert made.path == tmp_path / "new" / path.name
    assert (after.mask_id, after.vocab_size) == (before.vocab_size, before.vocab_size + 1)
    assert (made.mask_token_id, made.vocab_size_before, made.vocab_size) == (
        after.mask_id,
        before.vocab_size,
        after.vocab_size,
    )
    hard = [*texts[:20], *probe_texts(before, ["<|mask|>"]), "a<|mask|>b"]
    assert after.encode_batch(hard) == before.encode_batch(hard)
    assert after.piece(made.mask_token_id) == "<|mask|>"
    assert (after.bos_id, after.eos_id) == (before.bos_id, before.eos_id)
    check_mask(after, "new", after.mask_id)
    if path.suffix == ".json":  # one entry more, and not a byte of the rest
        first, second = (json.loads(one.read_text()) for one in (path, made.path))
        second["added_tokens"].pop()
        assert first == second


def test_settings_go_along(texts: list[str], tmp_path: Path) -> None:
    path = _without_mask("json", texts, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x", "eos_token": "<|endoftext|>"}')
    add_mask(path, tmp_path / "new", "<|mdm_mask|>")
    settings = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert settings == {"chat_template": "x", "eos_token": "<|endoftext|>", "mask_token": "<|mdm_mask|>"}
    add_mask(path, tmp_path / "alone.json")
    assert load_tokenizer(tmp_path / "alone.json").mask_id == 700


def test_what_is_refused(texts: list[str], tmp_path: Path) -> None:
    path = _without_mask("json", texts, tmp_path)
    for arguments, message in [
        ((path, tmp_path / "new", "[mask]"), r"--mask is '\[mask\]', expected a name by which a mask is found"),
        ((path, tmp_path / "new.model"), "expected a directory or a name that ends in .json"),
        ((path, path), "exists, and is not replaced"),
        ((tmp_path / "nowhere.json", tmp_path / "new"), r"nowhere\.json: no such file.*correct PATH"),
    ]:
        with pytest.raises(DataError, match=message):
            add_mask(*arguments)
    definition = json.loads(path.read_text())
    definition["model"]["vocab"]["<|mask|>"] = 700  # a word
    path.write_text(json.dumps(definition))
    with pytest.raises(DataError, match="is a token of it, which text can hold: choose another name by --mask"):
        add_mask(path, tmp_path / "new")
    made = add_mask(path, tmp_path / "new", "<mask>")
    with pytest.raises(DataError, match="has a mask already, '<mask>' of id 701"):
        add_mask(made.path, tmp_path / "newer")
    # ids with a hole in the middle: the library would give the mask one of them
    definition["model"]["vocab"]["<|mask|>"] = 9000
    path.write_text(json.dumps(definition))
    with pytest.raises(DataError, match="its ids have holes"):
        add_mask(path, tmp_path / "holes", "<mask>")
    assert not (tmp_path / "holes").exists()


@pytest.mark.parametrize("kind", ["json", "bpe.model"])
def test_ids_that_text_can_hold(kind: str, texts: list[str], tmp_path: Path) -> None:
    words = load_tokenizer(_without_mask(kind, texts, tmp_path))
    for text in ("def", " self", "\n", "x"):
        for token in words.encode(text):
            found = text_of(words, token)
            assert found is not None
            assert token in words.encode(found)
            with pytest.raises(DataError, match=f"model.mask_token_id is {token}, the id that t gives to the text"):
                check_mask(words, "t", token)
    assert words.eos_id is not None
    check_mask(words, "t", words.eos_id)  # no text gives it
    check_mask(words, "t", words.vocab_size)  # a row behind its own


def test_a_mask_that_is_a_word(texts: list[str], tmp_path: Path, illada: Illada, jsonl: Path) -> None:
    """SentencePiece lets text spell the pieces of a user: such a mask would be in the corpus."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()[:2000]),
        model_prefix=str(tmp_path / "t"),
        vocab_size=600,
        user_defined_symbols=["<mask>"],
        minloglevel=2,
    )
    outcome = illada("preprocess", jsonl, "--output-prefix", tmp_path / "s", "--tokenizer", tmp_path / "t.model")
    assert outcome.code == 2
    assert "t.model: its mask, id 3, is what it gives to the text '<mask>': expected a special token" in outcome.err
    assert not list(tmp_path.glob("s*"))


def test_preprocess_says_at_once_that_there_is_no_mask(
    texts: list[str], tmp_path: Path, illada: Illada, jsonl: Path
) -> None:
    _without_mask("json", texts, tmp_path)
    outcome = illada("preprocess", jsonl, "--output-prefix", tmp_path / "s", "--tokenizer", tmp_path)
    assert outcome.code == 0, outcome.err
    first = outcome.err.splitlines()[0]
    assert first.startswith(f"warning: {tmp_path / 'tokenizer.json'} has no mask token among its 700 ids")
    assert f"illada tokenizer add-mask {tmp_path / 'tokenizer.json'} --output NEW" in first
    assert "model.mask_token_id=700 with a model.vocab_size of 701 or more" in first
    outcome = illada("tokenizer", "add-mask", tmp_path, "--output", tmp_path / "new")
    assert outcome.code == 0, outcome.err
    for said in ("701 ids, 700 before", "gets 768 rows", "model.vocab_size=701\n", "model.mask_token_id=700\n"):
        assert said in outcome.out
    again = illada("preprocess", jsonl, "--output-prefix", tmp_path / "m", "--tokenizer", tmp_path / "new")
    assert again.code == 0, again.err
    assert "warning" not in again.err
    assert (tmp_path / "s.bin").read_bytes() == (tmp_path / "m.bin").read_bytes()
    outcome = illada("preprocess", jsonl, "--output-prefix", tmp_path / "x", "--tokenizer", tmp_path / "nowhere.json")
    assert (outcome.code, "correct --tokenizer" in outcome.err) == (2, True), outcome.err

"""Bytes of text behind tokens: exact, whatever spells them, and unknown rather than guessed."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.corpus.text_bytes import token_bytes, window_bytes
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

HARD = [
    "naïve Übung 中文、日本語 🙂👩‍💻 é ▁ � <0x0A> <mask> </s>",
    " leading, trailing \n",
    "\n",
    "a",
    "It isn't so , he said . Do n't ?",
]


@pytest.fixture(scope="module")
def with_prefix(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Tokenizer]:
    """A SentencePiece model that puts a space before each document, with bytes for what it does not know or without."""

    def train(byte_fallback: bool) -> Tokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in texts[:40] for line in text.splitlines()[:300]),
            model_writer=model,
            vocab_size=700,
            byte_fallback=byte_fallback,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )
        path = tmp_path_factory.mktemp("prefix") / "prefix.model"
        path.write_bytes(model.getvalue())
        return load_tokenizer(path)

    return train


def _corpora(tokenizer: Tokenizer, documents: list[str], write_shard, name: str = "text") -> Callable[[int], Corpus]:
    end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    ids = [tokenizer.encode(text) + end for text in documents]
    prefix = write_shard(name, ids, vocab_size=tokenizer.vocab_size)
    return lambda length: Corpus([prefix], length, 1, shuffle=False, vocab_size=tokenizer.vocab_size)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "prefix"])
def test_all_windows_together_are_the_text(
    kind: str, request: pytest.FixtureRequest, texts: list[str], write_shard
) -> None:
    """Windows begin and end inside of characters and documents. Of a wrong rule one byte in a document would show."""
    make = request.getfixturevalue("with_prefix") if kind == "prefix" else None
    tokenizer = make(True) if make else request.getfixturevalue(f"{kind}_tokenizer")
    documents = [*HARD, *(text[:2000] for text in texts[:12]), *HARD]
    sizes = token_bytes(tokenizer)
    assert not isinstance(sizes, str), sizes
    assert sizes.prefix_bytes == (1 if make else 0)
    corpus_of = _corpora(tokenizer, documents, write_shard)
    single = corpus_of(1)
    each = np.array([window_bytes(sizes, single, window) for window in range(single.num_windows)])
    assert each.sum() == sum(len(text.encode()) for text in documents)
    for length in (7, 64):
        corpus = corpus_of(length)
        whole = each[: corpus.num_windows * length].reshape(-1, length).sum(1)
        assert [window_bytes(sizes, corpus, window) for window in range(corpus.num_windows)] == whole.tolist()


def test_text_that_the_tokenizer_does_not_know_has_no_bytes(with_prefix, write_shard) -> None:
    """<unk> stands for anything."""
    tokenizer = with_prefix(False)
    sizes = token_bytes(tokenizer)
    assert not isinstance(sizes, str), sizes
    known, unknown = (
        _corpora(tokenizer, [text * 20], write_shard, name)(8)
        for name, text in (("known", "def f(self): pass "), ("unknown", "中文 中文 "))
    )
    assert window_bytes(sizes, known, 0) > 0
    assert np.isnan(window_bytes(sizes, unknown, 0))


def test_a_decoder_that_changes_its_tokens_is_not_believed(texts: list[str], tmp_path: Path) -> None:
    """WordPiece knows no spaces: what it gives back has others than the text had."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([text[:3000] for text in texts[:20]] + HARD, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = token_bytes(load_tokenizer(tmp_path / "tokenizer.json"))
    assert isinstance(found, str)
    assert "gives 'a , b . c' back as 'a, b. c'" in found
    assert token_bytes(None) == "data.tokenizer_path is not set"

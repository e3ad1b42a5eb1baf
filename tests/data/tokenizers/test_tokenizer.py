"""Tokenizers: text comes back exactly, special tokens cannot be forged, ids stay below vocab_size."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "  leading and trailing  ",
    "tabs\tand\r\nwindows\rlines\x0b\x0c\n\n\n\n",
    "\tdef f():\n        return 0\n",
    "\0\x01\x7f",
    "\ufeffbyte order mark",
    "naïve café 漢字 🙂 e\u0301 \u2028 \u00a0",
    "a literal \u2581 space sign, \u2581\u2581 two, and at the end \u2581",
    "\u2581",
    "unknown sign \u2585 and replacement \ufffd",
    "<s></s><pad><mask><unk><sep> <0x41> <|mdm_mask|><|endoftext|>",
    "1234567890 3.14159 0x1F",
    "x" * 20_000,
]


def test_real_text_comes_back_exactly(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Indentation is meaning in Python: a lost space or newline makes generated code wrong."""
    assert len(texts) > 50
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert batch[:5] == [tokenizer.encode(text) for text in texts[:5]]
    assert 1.5 < sum(len(text.encode()) for text in texts) / sum(map(len, batch)) < 5


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert not {tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


def test_random_unicode_comes_back_exactly(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    codes = [*range(0xD800), *range(0xE000, 0x110000)]
    texts = ["".join(map(chr, generator.choices(codes, k=50))) for _ in range(200)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


def test_special_ids(sentencepiece_tokenizer: Tokenizer, huggingface_tokenizer: Tokenizer) -> None:
    """The mask of a tokenizer trained here has iLLaDA's id."""
    for tokenizer, expected in [(sentencepiece_tokenizer, (5, 1, 2)), (huggingface_tokenizer, (2, 0, 1))]:
        assert (tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id) == expected
        assert tokenizer.vocab_size == 1000


def test_masks_are_shown_on_demand(tokenizer: Tokenizer) -> None:
    """Half-denoised text is unreadable when the masks are silently dropped."""
    assert tokenizer.mask_id is not None
    mask = tokenizer.piece(tokenizer.mask_id)
    assert mask in ("<mask>", "<|mdm_mask|>")
    ids = [
        tokenizer.mask_id,
        *tokenizer.encode("def f"),
        tokenizer.mask_id,
        tokenizer.mask_id,
        *tokenizer.encode("\n x"),
    ]
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{mask}def f{mask}{mask}\n x"
    assert tokenizer.decode(np.array(ids)) == "def f\n x"


def test_pieces_are_readable(tokenizer: Tokenizer) -> None:
    """No "▁return" or "Ġreturn" in a report; a lone byte of a character still has a name."""
    pieces = [tokenizer.piece(token_id) for token_id in tokenizer.encode("    return x\n")]
    assert "".join(pieces) == "    return x\n"
    assert all(tokenizer.piece(token_id) for token_id in tokenizer.encode("🙂"))
    assert all(isinstance(tokenizer.piece(token_id), str) for token_id in range(tokenizer.vocab_size))


@pytest.mark.parametrize("bad", [-1, 1000])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, bad: int) -> None:
    """A padded row of the embedding has no text; -1 would be the last piece in Python's habit."""
    with pytest.raises(IndexError, match=f"token id is {bad} at position 1, expected 0 to 999"):
        tokenizer.decode([7, bad])
    with pytest.raises(IndexError, match=f"token id is {bad}"):
        tokenizer.piece(bad)


def test_fingerprint_is_the_files_sha256(sentencepiece_path: Path, huggingface_path: Path) -> None:
    for path in (sentencepiece_path, huggingface_path):
        assert load_tokenizer(path).fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path, jsonl: Path) -> None:
    for name in ("text.model", "text.json", "text.txt"):
        (tmp_path / name).write_bytes(jsonl.read_bytes())
    for name, message in [
        ("text.model", "expected a SentencePiece model"),
        ("text.json", r"expected a Hugging Face tokenizer\.json"),
        ("text.txt", r"ends in '\.txt', expected `\.model`"),
        ("missing.model", "no such file"),
    ]:
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            load_tokenizer(tmp_path / name)


def test_training_gives_the_same_tokenizer_again(jsonl: Path, sentencepiece_path: Path, tmp_path: Path) -> None:
    """Two machines that prepare the same corpus have to get the same ids."""
    again = train_sentencepiece([jsonl], tmp_path / "again.model", vocab_size=1000)
    assert load_tokenizer(again).fingerprint == load_tokenizer(sentencepiece_path).fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


def test_trained_pieces_suit_source_code(sentencepiece_tokenizer: Tokenizer) -> None:
    """An indentation is one token, not eight; digits stand alone."""
    ids = sentencepiece_tokenizer.encode(":\n        return 2024")
    pieces = [sentencepiece_tokenizer.piece(token_id) for token_id in ids]
    assert pieces[0] == ":\n"
    assert len(pieces) <= 9
    assert pieces[-4:] == ["2", "0", "2", "4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "too little"}\n', "no tokenizer of 1000 pieces could be trained"),
        ('{"text": ""}\n', "no text"),
        ("", "no text"),
        ('{"text": "a"}\n{"txet": "b"}\n', r"input\.jsonl:2: the key 'text' is missing, found 'txet'"),
    ],
)
def test_unusable_training_text_leaves_no_model(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "input.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        train_sentencepiece([tmp_path / "input.jsonl"], tmp_path / "out.model", vocab_size=1000)
    with pytest.raises(DataError, match=r"expected to end in \.model"):
        train_sentencepiece([tmp_path / "input.jsonl"], tmp_path / "out.spm", vocab_size=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["input.jsonl"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_space_sign_in_text_with_a_dummy_prefix(model_type: str, texts: list[str], tmp_path: Path) -> None:
    """SentencePiece's defaults, as Llama 2 has them: a space before the text, none before what follows a sign."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts[:20] for line in text.splitlines() if line]),
        model_prefix=str(tmp_path / "default"),
        model_type=model_type,
        vocab_size=600,
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "default.model")
    for text in ("fox▁jumps", "fox ▁ jumps", "▁", "▁▁x", "x▁", "a▁b▁▁c \ue000▁\ue000", "no sign"):
        assert tokenizer.decode(tokenizer.encode(text)) == text

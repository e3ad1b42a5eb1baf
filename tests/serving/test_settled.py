"""What is sent of a text in work is the beginning of what it becomes, whatever the tokenizer."""

import io
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from illada_megatron.serving.settled import Settled

TEXT = ["the house of the ß, das Häuschen, 漢字 🙂 and and and of then the end\n"] * 50
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(folder: Path) -> Path:
    words = Library(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = [AddedToken("</s>", special=True)]
    words.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet)
    )
    return saved(words, folder)


def byte_fallback(folder: Path) -> Path:
    """As Llama's tokenizer.json: a run of bytes is text where all of it is, else none of it."""
    pieces = ["</s>", *BYTES, *"▁ theofnd", "▁the", "▁of", "ß", "漢"]
    words = Library(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True))
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words.add_special_tokens([AddedToken("</s>", special=True)])
    return saved(words, folder)


def word_piece(folder: Path) -> Path:
    pieces = ["</s>", "the", "##n", "##s", "of", ".", ",", "'", "a", "##nd", "[UNK]"]
    words = Library(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece(cleanup=True)
    words.add_special_tokens([AddedToken("</s>", special=True)])
    return saved(words, folder)


def saved(words: Library, folder: Path) -> Path:
    words.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def sentence_piece(folder: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder / "tokenizer.model"


@pytest.fixture(params=[byte_level, byte_fallback, word_piece, sentence_piece], ids=lambda one: one.__name__)
def words(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(request.param(tmp_path))


def pieces(source: random.Random, tokens: list[int]) -> list[list[int]]:
    """As steps settle them: some, one, none."""
    cuts = sorted(source.choices(range(len(tokens) + 1), k=source.randrange(12)))
    return [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]


def test_pieces_put_together_are_the_text(words: Tokenizer) -> None:
    source = random.Random(0)
    sent_before_the_end = 0
    for _ in range(400):
        tokens = [source.randrange(words.vocab_size) for _ in range(source.randrange(40))]
        if source.random() < 0.5:  # characters of several bytes, whole
            tokens = words.encode("".join(source.choices("theßof 漢🙂\n", k=30)))[: source.randrange(1, 60)]
        text = words.decode(tokens)
        stop = [text[at : at + source.randrange(1, 5)] for at in source.choices(range(len(text) + 1), k=2)]
        stop = [one for one in stop if one and source.random() < 0.5]
        final = text[: min([text.find(one) for one in stop], default=len(text))]
        settled = Settled(words, words.decode, stop)
        sent = "".join(settled.more(piece) for piece in pieces(source, tokens))
        assert sent + settled.rest(final) == final
        sent_before_the_end += len(sent)
    assert sent_before_the_end > 1000


def test_nothing_is_sent_behind_the_end(words: Tokenizer) -> None:
    token = words.encode("the")[0]
    end = 0 if words.eos_id is None else words.eos_id
    settled = Settled(words, words.decode, ends=[end])
    sent = settled.more([token, end, token, token]) + settled.more([token])
    assert words.decode([token]).startswith(sent)


def test_a_pattern_holds_everything() -> None:
    """It may begin in what would have been sent."""
    settled = Settled(None, None, hold=True)  # type: ignore[arg-type]  (asked for nothing)
    assert settled.more([1, 2, 3]) == ""
    assert settled.rest("text") == "text"


def test_half_a_stop_string_waits(tmp_path: Path) -> None:
    words = load_tokenizer(byte_level(tmp_path))
    settled = Settled(words, words.decode, ["ending", "d of"])
    assert settled.more(words.encode("the en")) == "the "
    assert settled.more(words.encode("d o")) == "en"
    assert settled.more(words.encode("x")) == "d ox"


def test_a_text_that_has_become_another_is_an_error(tmp_path: Path) -> None:
    words = load_tokenizer(byte_level(tmp_path))
    settled = Settled(words, words.decode)
    settled.more(words.encode("the"))
    with pytest.raises(ValueError, match="ask without stream"):
        settled.rest("that")

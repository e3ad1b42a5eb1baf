"""What is generated, as text: it follows the prompt, and special tokens end it."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from illada_megatron.data.tokenizers.tokenizer import load_tokenizer
from illada_megatron.generation import FunctionModel, Generator, Settings
from illada_megatron.serving.settled import Settled
from tests.serving.test_settled import byte_fallback, byte_level, saved, sentence_piece

MAKERS = pytest.mark.parametrize("make", [byte_fallback, byte_level, sentence_piece])


def writing(file: Path, tokens: list[int], most: int = 256) -> Generator:
    """A model that writes these tokens, whatever the prompt is; the mask has no word."""
    words = load_tokenizer(file)
    mask = words.vocab_size
    config = SimpleNamespace(mask_token_id=mask, max_sequence_length=most, vocab_size=mask + 1)

    def predict(text: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, text.shape[1], mask + 1)
        for place, token in enumerate(tokens):
            logits[0, text.shape[1] - len(tokens) + place, token] = 9
        return logits

    return Generator(FunctionModel(predict, mask + 1), words, config)  # type: ignore[arg-type]


def all_at_once(count: int, **settings: object) -> Settings:
    return Settings(gen_length=count, block_length=count, steps=1, **settings)  # type: ignore[arg-type]


@MAKERS
def test_prompt_and_text_are_what_all_tokens_are(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file, source = make(tmp_path), random.Random(0)
    words = load_tokenizer(file)
    piece = words.encode("the house of the end")
    for _ in range(40):
        tokens = [source.choice(piece) for _ in range(6)]
        prompt = [source.choice(piece) for _ in range(3)]
        generator = writing(file, tokens)
        result = generator.generate([prompt], all_at_once(6))[0]
        assert words.decode(prompt) + result.text == words.decode(prompt + tokens)
        assert generator.generate([[]], all_at_once(6))[0].text == words.decode(tokens)
        text, decode, _ = generator.text(prompt, all_at_once(6))
        settled = Settled(words, decode)
        assert settled.more(tokens[:3]) + settled.more(tokens[3:]) + settled.rest(result.text) == result.text
        assert text.given == 3


@pytest.mark.parametrize("make", [byte_fallback, sentence_piece])
def test_a_stop_string_begins_with_the_first_space(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = make(tmp_path)
    tokens = load_tokenizer(file).encode("the")[-1:] * 2
    prompt = load_tokenizer(file).encode("of")
    before = load_tokenizer(file).decode(prompt)
    whole = load_tokenizer(file).decode(prompt + tokens)[len(before) :]
    result = writing(file, tokens).generate([prompt], all_at_once(2, stop=(whole[:4],)))[0]
    assert (result.finish, result.text) == ("stop", "")


def special(tmp_path: Path) -> Path:
    words = Library.from_file(str(byte_level(tmp_path)))
    words.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_end|>", "</think>")])
    return saved(words, tmp_path)


def test_a_special_token_stops_the_text(tmp_path: Path) -> None:
    file = special(tmp_path)
    words = load_tokenizer(file)
    end, (the,) = words.special_ids()["<|im_end|>"], words.encode("the")[:1]
    generator = writing(file, [the, end, the, end])
    result = generator.generate([[the]], all_at_once(4, stop=("<|im_end|>",)))[0]
    assert (result.finish, result.text) == ("stop", words.decode([the]))
    assert result.tokens.tolist() == [the, the, end]
    settled = Settled(words, words.decode, ["<|im_end|>"], generator.words.ends(all_at_once(4, stop=("<|im_end|>",))))
    assert settled.more([the, end, the]) == words.decode([the])
    assert writing(file, [the, end, the, end]).generate([[the]], all_at_once(4))[0].finish == "length"
    by_name = writing(file, [the, words.eos_id or 0, the, end]).generate([[the]], all_at_once(4, stop=("</s>",)))[0]
    assert by_name.finish == "eos"


def test_the_end_of_thinking_may_be_a_special_token(tmp_path: Path) -> None:
    file = special(tmp_path)
    assert writing(file, [1]).words.end_think == (load_tokenizer(file).special_ids()["</think>"],)
    plain = byte_level(tmp_path)
    assert writing(plain, [1]).words.end_think == tuple(load_tokenizer(plain).encode("</think>"))


def test_gaps_are_counted_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = writing(byte_level(tmp_path), [1], most=4096)
    asked: list[str] = []
    encode = generator.tokenizer.encode
    monkeypatch.setattr(generator.tokenizer, "encode", lambda text: asked.append(text) or encode(text))
    with pytest.raises(ValueError, match=r"<mask:4096> makes a text of 8192 tokens, .* is 4096: ask for fewer"):
        generator.tokens("<mask:4096>" * 90_000)
    assert len(asked) == 2
    assert len(generator.tokens("<mask:4000><mask:96>")) == 4096

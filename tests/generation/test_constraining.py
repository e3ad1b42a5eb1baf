"""Text that follows an expression: what is possible at each mask is what enumerating all texts finds, and what comes
out matches."""

import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("outlines_core")

from illada_megatron.data.tokenizers.tokenizer import SPACE_SIGN, load_tokenizer
from illada_megatron.generation import Generator, Settings
from illada_megatron.generation.constraining import Constraint, automaton
from illada_megatron.generation.engine import Engine
from illada_megatron.generation.indexing import edges_of, expression_of
from illada_megatron.generation.model import FunctionModel
from illada_megatron.generation.proposing import Words
from illada_megatron.generation.text import Text
from tests.checkpoint.random_weights import small_config

EOS, MASK = 0, 1
SPELLED = ["", "", "a", "b", "c", "ab", "bc", "aa", "1", "-1"]
WORDS = {word.encode(): [token_id] for token_id, word in enumerate(SPELLED) if word}
EXPRESSIONS = ("(ab|c)*", "a+b?c*", "(a|b)(a|b)1*", "a{3,5}", "[abc]*1", "(-1|11)+c", "(aa|aab)*c?")


def _matching(expression: str, known: Sequence[int], budget: int) -> set[tuple[int, ...]]:
    """All ways to fill in `known` so that it, with at most `budget` more tokens, matches; by enumeration."""
    found = set()
    choices = [range(len(SPELLED)) if token == MASK else [token] for token in known]
    for tokens in itertools.product(*choices):
        ended = EOS in tokens
        end = tokens.index(EOS) if ended else len(tokens)
        if MASK in tokens or any(token != EOS for token in tokens[end:]):
            continue
        text = "".join(SPELLED[token] for token in tokens[:end])
        more = range(0 if ended else budget, -1, -1)
        if any(
            re.fullmatch(expression, text + "".join(rest))
            for count in more
            for rest in itertools.product([word for word in SPELLED if word], repeat=count)
        ):
            found.add(tokens)
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_possible_is_what_enumeration_finds(expression: str) -> None:
    machine = automaton(edges_of(expression, WORDS), WORDS, EOS)
    generator = torch.Generator().manual_seed(len(expression))
    seen = 0
    for block, length in ((2, 3), (3, 3), (3, 4), (1, 3)):
        possible = sorted(_matching(expression, [MASK] * block, length - block))
        for _ in range(6):
            if not possible:
                with pytest.raises(ValueError, match="the shortest text that matches has"):
                    Constraint(machine, Text(torch.tensor([5]), Settings(gen_length=length, block_length=None), MASK))
                break
            # some tokens of a text that matches are known
            whole = possible[int(torch.randint(len(possible), (1,), generator=generator))]
            hidden = torch.rand(block, generator=generator) < 0.6
            hidden[int(torch.randint(block, (1,), generator=generator))] = True
            known = [MASK if mask else token for token, mask in zip(whole, hidden.tolist(), strict=True)]
            text = Text(torch.tensor([5]), Settings(gen_length=length, block_length=block, steps=1), MASK)
            assert text.next_block()
            text.reveal(
                (~hidden).nonzero().flatten(),
                torch.tensor(whole)[~hidden],
                torch.ones(int((~hidden).sum()), dtype=torch.float64),
            )
            logits = torch.zeros(text.block.numel(), len(SPELLED))
            Constraint(machine, text).allow(logits, text)
            fits = _matching(expression, known, length - block)
            for row, position in enumerate(text.block.tolist()):
                expected = {tokens[position - 1] for tokens in fits}
                assert set(logits[row].isfinite().nonzero().flatten().tolist()) == expected, (known, position)
                seen += len(expected)
    assert seen > 20


def _random_model(seed: int, vocabulary: int = len(SPELLED)) -> FunctionModel:
    def predict(tokens: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + int((tokens * torch.arange(1, tokens.numel() + 1)).sum()))
        return 3 * torch.randn(1, tokens.numel(), vocabulary, generator=generator)

    return FunctionModel(predict, vocabulary)


RULES = (
    Settings(gen_length=12, block_length=4, steps=2),
    Settings(gen_length=12, block_length=4, reveal="threshold", threshold=0.2),
    Settings(gen_length=12, block_length=6, reveal="factor", factor=0.2, remasking="margin", fixed_length=True),
    Settings(gen_length=12, block_length=None, steps=3, temperature=1.0, top_k=3, eos="last"),
    Settings(gen_length=12, block_length=4, reveal="hierarchy", threshold=0.5, low_threshold=0.1, credit=True),
    Settings(gen_length=12, block_length=4, steps=1, remasking="entropy", repetition_penalty=1.5),
)


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("settings", RULES, ids=lambda one: f"{one.reveal}-{one.remasking}")
def test_what_comes_out_matches(expression: str, settings: Settings) -> None:
    """Tokens that a step reveals together too."""
    machine = automaton(edges_of(expression, WORDS), WORDS, EOS)
    for seed in range(8):
        engine = Engine(_random_model(seed), Words(MASK, EOS))
        text = Text(torch.tensor([3, 2]), _with(settings, expression, seed), MASK)
        engine.add(text, None, Constraint(machine, text))
        (end,) = [step.end for _, step in engine.run() if step.end is not None]
        found = text.generated.tolist()
        words = "".join(SPELLED[token] for token in (found[:-1] if end.finish == "eos" else found))
        assert re.fullmatch(expression, words), (words, found)
        assert MASK not in found


def _with(settings: Settings, expression: str, seed: int) -> Settings:
    return Settings(**{**vars(settings), "regex": expression, "seed": seed})


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yes"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a few words; mask 5, end of text 2."""
    special = ["<unk>", "<s>", "</s>", "<x>", "<y>", "<mask>"]
    merges = [("y", "e"), ("ye", "s"), ('"', "a"), ('"a', '"'), ("{", '"a"')]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({word: token_id for token_id, word in enumerate(words)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    path = tmp_path_factory.mktemp("characters") / "tokenizer.json"
    made.save(str(path))
    return path


def test_a_json_schema(place: Path, characters: Path) -> None:
    """Through a tokenizer, with several texts and rules in one call."""
    with Generator.open(place / "run", "cpu", characters) as generator:
        settings = [
            Settings(gen_length=60, block_length=20, steps=20, json_schema=json.dumps(SCHEMA)),
            Settings(gen_length=60, block_length=12, reveal="threshold", threshold=0.1, json_schema=json.dumps(SCHEMA)),
            Settings(gen_length=8, block_length=8, steps=4, regex="(yes|no), [a-z]{2}"),
            Settings(gen_length=8, block_length=8, steps=4),
        ]
        results = generator.generate(["a", "b:", "c", "d"], settings)
        alone = [generator.generate([prompt], [one])[0] for prompt, one in zip("d", settings[3:], strict=True)]
    for result in results[:2]:
        found = json.loads(result.text)
        assert set(found) == {"a", "b"}
        assert isinstance(found["a"], int)
        assert found["b"] in ("x", "yes")
    assert re.fullmatch("(yes|no), [a-z]{2}", results[2].text)
    assert results[3].tokens.tolist() == alone[0].tokens.tolist()


def _sentencepiece(folder: Path) -> Path:
    """Puts a space before a text, with bytes for what it does not know."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["yes no maybe", "no yes", "an answer: yes", "another one"] * 20),
        **{"model_writer": model, "vocab_size": 300, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2},
        **{"control_symbols": ["<mask>"], "hard_vocab_limit": False, "remove_extra_whitespaces": False},
    )
    path = folder / "words.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level with a space before", "byte-level"])
def test_texts_of_every_kind_of_tokenizer(kind: str, characters: Path, tmp_path: Path) -> None:
    """The space that some put before a text is none of it; one that the expression asks for is."""
    path = characters if kind == "byte-level" else _sentencepiece(tmp_path)
    if kind == "byte-level with a space before":
        definition = json.loads(characters.read_text())
        definition["pre_tokenizer"]["add_prefix_space"] = True
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(definition))
    tokenizer = load_tokenizer(path)
    sizes = [f"model.vocab_size={tokenizer.vocab_size}", f"model.mask_token_id={tokenizer.mask_id}"]
    config = small_config(*sizes, "model.max_sequence_length=64").model
    begun = set()
    for seed in range(12):
        generator = Generator(_random_model(seed, tokenizer.vocab_size), tokenizer, config)
        for expression in ("(yes|no)", " yes", "( |\\n)*x", "^..$", "no( yes)*", "é?b"):
            (result,) = generator.generate(["so: "], Settings(gen_length=9, block_length=9, steps=3, regex=expression))
            assert re.fullmatch(expression, result.text), (expression, result.text)
            begun.add(tokenizer.spelled(int(result.tokens[len(tokenizer.encode("so: "))]))[:1])
    assert (SPACE_SIGN in begun or "\u0120" in begun) == (kind != "byte-level") or kind == "byte-level"


def test_what_is_refused(place: Path, characters: Path) -> None:
    with pytest.raises(ValueError, match="regex and json_schema are both given"):
        Settings(regex="a", json_schema="{}")
    with pytest.raises(ValueError, match="eos 'never' leaves a text that follows"):
        Settings(regex="a", eos="never")
    with pytest.raises(ValueError, match="stop and stop_pattern would cut a text"):
        Settings(regex="a", stop="b")
    for schema, why in (
        ("{", ""),
        ("[]", "expected an object, found"),
        ('{"properties": 3}', ""),
        ('{"type": "integer", "minimum": 10}', "it has minimum, expected nothing but"),
        ('{"allOf": [{"type": "integer"}]}', "it has allOf"),
        ('{"properties": {"a": {"items": {"uniqueItems": true}}}}', "it has uniqueItems"),
        ('{"$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"}', "refers to itself"),
    ):
        with pytest.raises(ValueError, match=f"a regular expression can follow: .*{re.escape(why)}"):
            expression_of(schema)
    with Generator.open(place / "run", "cpu", characters) as generator:
        for settings, prompt, why in (
            (Settings(regex="(a", gen_length=20), "a", r"regex '\(a': "),
            (Settings(regex="a{30}", gen_length=20), "a", "the shortest text that matches has 30 tokens"),
            (Settings(regex="a\x00b", gen_length=20), "a", "no text of the tokenizer's tokens matches"),
            (Settings(regex="a", gen_length=20), "a<mask:3>", "an infilling takes none"),
        ):
            with pytest.raises(ValueError, match=why):
                generator.generate([prompt], settings)

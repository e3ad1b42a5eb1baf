"""llama.cpp runs what to-gguf writes: the same logits, the same greedy tokens as `Generator`, the same ids of text."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from random_weights import logits_of, random_checkpoint, small_config
from source_tokenizers import HARD, SOURCES, byte_level, trained_sentencepiece
from tokenizers import Regex, pre_tokenizers
from torch import Tensor

from illada_megatron.checkpoint.gguf.exporting import GgufDtype, export_gguf
from illada_megatron.checkpoint.gguf.vocabulary import Vocabulary, vocabulary
from illada_megatron.checkpoint.predictor import find_checkpoint
from illada_megatron.config import RunConfig
from illada_megatron.data.tokenizers.tokenizer import SPACE_SIGN, load_tokenizer
from illada_megatron.generation import Generator, Settings

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it is built from source)")

from benchmarks.generation.llama_loop import LlamaModel

DEMO = os.environ.get("ILLADA_DEMO")
"""A folder in which `make demo` has run."""

MODELS = {
    "grouped queries, tied": (),
    "untied, more groups": ("model.tie_word_embeddings=false", "model.num_query_groups=4"),
    "heads of another size": ("model.kv_channels=12",),
    "biases": ("model.add_qkv_bias=true",),
    "one group, another base": ("model.num_query_groups=1", "model.rotary_base=10000", "model.norm_epsilon=1e-6"),
    "linear scaling": ("model.rope_scaling.rope_type=linear", "model.rope_scaling.factor=4.0"),
    "yarn": tuple(
        f"model.rope_scaling.{one}" for one in ("rope_type=yarn", "factor=4.0", "original_max_position_embeddings=16")
    ),
    "yarn, sharper": tuple(
        f"model.rope_scaling.{one}"
        for one in ("rope_type=yarn", "factor=4.0", "original_max_position_embeddings=16", "attention_factor=1.5")
    ),
}


@contextmanager
def _in_llama_cpp(
    run: Path, file: Path, longest: int, words: Vocabulary | None = None, dtype: GgufDtype = "fp32"
) -> Iterator[LlamaModel]:
    """The newest checkpoint of a run."""
    export_gguf(find_checkpoint(run), file, dtype, words)
    model = LlamaModel(file, longest)
    try:
        yield model
    finally:
        model.close()


def _denoised(
    model: LlamaModel, prompt: Sequence[int], settings: Settings, never: list[int], mask: int, ids: int
) -> list[int]:
    """Fixed length, block by block, the surest of the block's masks first; slow and obvious. never: no candidates,
    nor are those from `ids` on."""
    length, block = settings.gen_length, settings.block_length or settings.gen_length
    tokens = [*prompt, *[mask] * length]
    for start in range(len(prompt), len(tokens), block):
        for step in range(settings.steps):
            masks = [position for position in range(start, start + block) if tokens[position] == mask]
            reveals = block // settings.steps + (step < block % settings.steps)
            logits = model.logits(tokens)[masks, :ids].double()
            logits[:, never] = -math.inf
            confidence, candidates = logits.softmax(-1).max(-1)
            for row in sorted(range(len(masks)), key=lambda one: -float(confidence[one]))[:reveals]:
                tokens[masks[row]] = int(candidates[row])
    return tokens


def _some_tokens(config: RunConfig, length: int, seed: int = 1) -> Tensor:
    """[s], a third of them masks."""
    tokens = torch.randint(0, config.model.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
    tokens[::3] = config.model.mask_token_id
    return tokens


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_the_same_logits(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Of every position, and of a text of another length after it: nothing is left of the one before."""
    config = small_config(*overrides)
    random_checkpoint(tmp_path / "run", config)
    with _in_llama_cpp(tmp_path / "run", tmp_path / "m.gguf", 64) as model:
        assert model.is_diffusion
        assert model.vocab_size == config.model.vocab_size
        for length in (40, 64, 7):
            tokens = _some_tokens(config, length)
            found = model.logits(tokens.tolist())
            torch.testing.assert_close(found, logits_of(tmp_path / "run", tokens[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_the_bytes_are_near(dtype: GgufDtype, tmp_path: Path) -> None:
    """llama.cpp rounds what it multiplies such weights with, too."""
    config = small_config("training.precision=bf16")
    random_checkpoint(tmp_path / "run", config, main=True)
    tokens = _some_tokens(config, 40)
    expected = logits_of(tmp_path / "run", tokens[None])[0]
    with _in_llama_cpp(tmp_path / "run", tmp_path / "m.gguf", 64, dtype=dtype) as model:
        difference = (model.logits(tokens.tolist()) - expected).norm() / expected.norm()
        assert difference < 0.02


@pytest.mark.parametrize("steps", [8, 3])
def test_the_same_greedy_tokens_of_a_random_llada(steps: int, sentencepiece_model: Path, tmp_path: Path) -> None:
    """Hidden 256, four layers, grouped queries, 4,000 ids; the prompt as text through both tokenizers."""
    config = small_config(
        *("model.hidden_size=256", "model.ffn_hidden_size=704", "model.num_layers=4", "model.num_attention_heads=8"),
        *("model.vocab_size=4000", "model.max_sequence_length=128", "model.tie_word_embeddings=false"),
        f"data.tokenizer_path={sentencepiece_model}",
    )
    random_checkpoint(tmp_path / "run", config, piece_bytes=1 << 22)
    _compare_greedy(tmp_path / "run", tmp_path / "m.gguf", sentencepiece_model, steps)


@pytest.mark.skipif(DEMO is None, reason="ILLADA_DEMO names no folder in which `make demo` has run")
@pytest.mark.parametrize("steps", [32, 8])
def test_the_same_greedy_tokens_of_the_demo(steps: int, tmp_path: Path) -> None:
    folder = Path(DEMO or "")
    _compare_greedy(folder / "run" / "checkpoints", tmp_path / "m.gguf", folder / "tokenizer.model", steps)


def _compare_greedy(run: Path, file: Path, tokenizer: Path, steps: int) -> None:
    settings = Settings(gen_length=64, block_length=32, steps=steps, fixed_length=True, eos="never")
    prompts = ["def main(argv):\n    ", "import os\nimport sys\n", "class A:  # naïve"]
    with Generator.open(run, "cpu", tokenizer) as generator:
        words, mask = generator.tokenizer, generator.config.mask_token_id
        expected = [result.tokens.tolist() for result in generator.generate(prompts, settings)]
    never = [mask] if words.eos_id is None else [mask, words.eos_id]
    with _in_llama_cpp(run, file, 128, vocabulary(tokenizer)) as model:
        assert model.mask_token_id == mask
        for prompt, tokens in zip(prompts, expected, strict=True):
            ids = model.encode(prompt)
            assert ids == words.encode(prompt)
            assert _denoised(model, ids, settings, never, mask, words.vocab_size) == tokens
            assert model.decode(tokens) == words.decode(tokens)


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_ENDINGS, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cut_by(expression: str) -> object:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTE_LEVEL = {
    "gpt-2": (_GPT2, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]), False),
    "llama 3": (_cut_by(rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"), True),
    "llama 3, merged": (_cut_by(rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"), False),
    "qwen 2": (_cut_by(rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"), False),
}


def _compare_ids(tokenizer: Path, folder: Path) -> None:
    """Of hard texts, and of this package's sources, which spell special tokens."""
    words = load_tokenizer(tokenizer)
    mask = 5 if words.mask_id is None else words.mask_id
    random_checkpoint(
        folder / "run", small_config(f"model.vocab_size={words.vocab_size + 7}", f"model.mask_token_id={mask}")
    )
    texts = [*HARD, *(source.read_text().replace(SPACE_SIGN, "") for source in SOURCES)]
    found = vocabulary(tokenizer)
    with _in_llama_cpp(folder / "run", folder / "m.gguf", 8, found) as model:
        assert model.mask_token_id == mask
        for text in texts:
            ids = words.encode(text)
            assert model.encode(text) == ids, text[:80]
            if not any("decoded text" in note for note in found.notes):
                assert model.decode(ids) == words.decode(ids), text[:80]


@pytest.mark.parametrize("kind", ["ours", "as Llama's", "pieces of the user"])
def test_the_same_ids_of_sentencepiece(kind: str, sentencepiece_model: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {
        **{"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True},
        "remove_extra_whitespaces": False,
    }
    if kind == "pieces of the user":
        settings |= {"user_defined_symbols": ["<|im_start|>", "==="], "add_dummy_prefix": False}
    path = sentencepiece_model if kind == "ours" else trained_sentencepiece(tmp_path / "t.model", **settings)
    _compare_ids(path, tmp_path)


@pytest.mark.parametrize(("pre_tokenizer", "ignore_merges"), BYTE_LEVEL.values(), ids=BYTE_LEVEL.keys())
def test_the_same_ids_of_byte_level_bpe(pre_tokenizer: object, ignore_merges: bool, tmp_path: Path) -> None:
    _compare_ids(byte_level(tmp_path / "tokenizer.json", pre_tokenizer, ignore_merges), tmp_path)

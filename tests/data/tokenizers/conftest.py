"""Tokenizers of all kinds, and texts that tell libraries apart."""

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizer_kinds import PRE_TOKENIZERS
from tokenizers import pre_tokenizers

from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece


@pytest.fixture(scope="session")
def paths(
    texts: list[str],
    jsonl: Path,
    sentencepiece_path: Path,
    huggingface_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Tokenizers of all kinds that users bring."""
    directory = tmp_path_factory.mktemp("kinds")
    unigram = train_sentencepiece([jsonl], directory / "unigram.model", vocab_size=600, model_type="unigram")
    made = {"sentencepiece": sentencepiece_path, "unigram": unigram, "gpt2": huggingface_path}
    for name, parts in PRE_TOKENIZERS.items():
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=["<|endoftext|>", "<|im_start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        if name == "qwen":
            tokenizer.normalizer = tokenizers.normalizers.NFC()
            tokenizer.add_tokens(["addedword", "return  x"])
        made[name] = directory / f"{name}.json"
        tokenizer.save(str(made[name]))
    return made


@pytest.fixture(scope="session")
def awkward_texts(texts: list[str]) -> list[str]:
    """Real text with rare characters and special tokens thrown in."""
    generator = random.Random(3)
    thrown = [
        "\u2581",
        "<mask>",
        "<|endoftext|>",
        "</s>",
        "é",
        "漢字",
        "🙂",
        "e\u0301",
        "\u180e",
        "\0",
        "\r\n",
        "addedword",
    ]
    made = []
    for text in texts:
        cut = generator.randrange(len(text))
        made.append(text[:cut] + generator.choice(thrown) + text[cut : cut + 3000])
    return made

"""What the data tests share: real text (modules of the standard library), tokenizers trained on it, real shards."""

import json
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

WriteShard = Callable[..., Path]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 1 MB of Python source."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for package in ("json", "email", "asyncio", "unittest") for path in (library / package).glob("*.py")]
    return [text for path in sorted(paths) if (text := path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="session")
def jsonl(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sentencepiece_path(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece([jsonl], tmp_path_factory.mktemp("tokenizer") / "small.model", vocab_size=1000)


@pytest.fixture(scope="session")
def huggingface_path(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with LLaDA's names of special tokens, saved with a length limit as some published ones are."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(max_length=16)
    tokenizer.enable_padding(length=16)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_path: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_path)


@pytest.fixture(scope="session")
def huggingface_tokenizer(huggingface_path: Path) -> Tokenizer:
    return load_tokenizer(huggingface_path)


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Both kinds, one after the other."""
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def write_shard(tmp_path: Path) -> WriteShard:
    """write_shard(name, documents, vocab_size) -> prefix, in the test's own directory."""

    def write(name: str, documents: Sequence[Sequence[int]], vocab_size: int = 1000) -> Path:
        with IndexedDatasetWriter(tmp_path / name, vocab_size) as writer:
            tokens = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
            writer.add(tokens, [len(document) for document in documents])
        return tmp_path / name

    return write

"""A long text encoded in pieces has the ids that it has as a whole, whatever tokenizer; else it is not cut."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import tokenizers
from tokenizer_kinds import KINDS
from tokenizers import decoders, normalizers, pre_tokenizers

from illada_megatron.data.tokenizers import long_texts
from illada_megatron.data.tokenizers.engines import choose_engine, open_engine
from illada_megatron.data.tokenizers.long_texts import LongTexts
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

ADDED_WITH_SPACES = "qwen"


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(long_texts, "LONG_CHARACTERS", 1_000)
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_whole(kind: str, paths: dict[str, Path], awkward_texts: list[str]) -> None:
    text = " ".join(awkward_texts[:150])
    tokenizer = load_tokenizer(paths[kind])
    pieces = list(LongTexts(tokenizer).pieces(text))
    if kind == ADDED_WITH_SPACES:
        assert pieces == [text]
    else:
        assert len(pieces) > len(text) / 1000 > 50
        assert max(map(len, pieces)) < 5_000
    whole = tokenizer.encode(text)
    of_pieces = [token for piece in pieces for token in tokenizer.encode(piece)]
    if kind == "unigram":
        assert len(of_pieces) == len(whole)
        assert sum(one != other for one, other in zip(of_pieces, whole, strict=True)) < len(whole) / 1000
        whole = of_pieces
    assert of_pieces == whole
    for engine in (choose_engine(paths[kind]), open_engine(paths[kind], "reference")):
        tokens, lengths = engine.encode(["short", text, "", "a b"])
        short, end = tokenizer.encode("short"), tokenizer.encode("a b")
        assert tokens.tolist() == [*short, *whole, *end]
        assert lengths.tolist() == [len(short), len(whole), 0, len(end)]


def _with(path: Path, directory: Path, **parts: Any) -> Path:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    tokenizer.save(str(directory / "changed.json"))
    return directory / "changed.json"


SUPERWORDS: dict[str, dict[str, Any]] = {
    "characters": {},
    "metaspace": {"pre_tokenizer": pre_tokenizers.Metaspace(split=False), "decoder": decoders.Metaspace()},
    "metaspace, no decoder": {"pre_tokenizer": pre_tokenizers.Metaspace(split=False)},
    "bytes": {"pre_tokenizer": pre_tokenizers.ByteLevel(False, use_regex=False), "decoder": decoders.ByteLevel()},
    "bytes, no decoder": {"pre_tokenizer": pre_tokenizers.ByteLevel(False, use_regex=False)},
}


@pytest.mark.parametrize("kind", SUPERWORDS)
def test_tokens_that_reach_across_words_are_not_cut(
    kind: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary says so: neighbourhoods, which may be too short, are not asked."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    for name, part in SUPERWORDS[kind].items():
        setattr(tokenizer, name, part)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2000, show_progress=False, special_tokens=["</s>"])
    tokenizer.train_from_iterator([text[:2000] for text in texts[:200]], trainer)
    tokenizer.save(str(tmp_path / "superwords.json"))
    loaded = load_tokenizer(tmp_path / "superwords.json")
    assert any(re.search("e[ \u2581\u0120]t", loaded.spelled(token)) for token in range(loaded.vocab_size))
    text = " ".join(texts[:20])
    monkeypatch.setattr(loaded, "encode_batch", None)
    assert list(LongTexts(loaded).pieces(text)) == [text]


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Prepend("x")},
        {"normalizer": normalizers.Replace(tokenizers.Regex(r"\w\Z"), "!")},
        {"pre_tokenizer": pre_tokenizers.Split(tokenizers.Regex(r"\A\w+ \w"), "merged_with_next")},
        {"pre_tokenizer": pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]{1,100}"), "isolated")},
        {"pre_tokenizer": pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]{1,50}"), "isolated")},
    ],
    ids=["beginning", "end", "split", "every 100th", "every 50th"],
)
def test_rules_about_a_texts_ends_forbid_to_cut_it(
    parts: dict[str, Any],
    paths: dict[str, Path],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = load_tokenizer(_with(paths["gpt4"], tmp_path, **parts))
    text = " ".join(texts[:20])
    asked: list[int] = []
    encode_batch = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda some: asked.append(len(some)) or encode_batch(some))
    pieces = list(LongTexts(tokenizer).pieces(text))
    assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)
    assert len(asked) < 4 * len(pieces) + 50, "every place of a text without an end is tried"


def test_a_text_without_words_stays_whole(paths: dict[str, Path]) -> None:
    for text in ("漢字、かな。" * 2_000, "QUJD" * 3_000, "1 2\n" * 3_000):
        assert list(LongTexts(load_tokenizer(paths["gpt4"])).pieces(text)) == [text]


_PREPROCESS = """
import resource, sys
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess
preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], PreprocessOptions(workers=1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)
"""


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt4"])
def test_a_long_document_takes_little_memory(
    kind: str, paths: dict[str, Path], texts: list[str], tmp_path: Path
) -> None:
    """Of 20 MB. As a whole it took 1.3 GB with gigatoken."""
    pytest.importorskip("gigatoken")
    text = " ".join(texts)
    text = (text * (20_000_000 // len(text) + 1))[:20_000_000]
    peaks = {}
    for name, document in (("short", text[:100_000]), ("long", text)):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(orjson.dumps({"text": document}) + b"\n")
        command = [sys.executable, "-c", _PREPROCESS, path, tmp_path / name, paths[kind]]
        peaks[name] = int(subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout)
    assert peaks["long"] - peaks["short"] < 400

"""What was compared once is not compared again, unless something changed; the user's own texts are, each time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from illada_megatron.data.tokenizers import engine_verdicts, engines
from illada_megatron.data.tokenizers.engine_libraries import Library
from illada_megatron.data.tokenizers.engine_verdicts import Verdict, Verdicts
from illada_megatron.data.tokenizers.engines import choose_engine
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("fastokens")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tokenizer's path for each time that the built-in texts are made."""
    made: list[str] = []
    honest = engines.probe_texts

    def probe_texts(tokenizer: Any, names: list[str]) -> list[str]:
        made.append(tokenizer.fingerprint)
        return honest(tokenizer, names)

    monkeypatch.setattr(engines, "probe_texts", probe_texts)
    return made


def _kept_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_a_comparison_is_made_once(huggingface_path: Path, cache: Path, comparisons: list[str]) -> None:
    first = choose_engine(huggingface_path)
    second = choose_engine(huggingface_path)
    assert len(comparisons) == 1
    assert (second.name, second.report) == (first.name, first.report)
    assert first.name == "fastokens"
    assert len(_kept_in(cache)) == 1


def test_a_refusal_is_remembered_and_not_tried_first(
    huggingface_path: Path, cache: Path, comparisons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = engines.open_library

    def open_library(name: str, path: Path) -> Library:
        library = honest(name, path)
        return library._replace(encode=lambda texts: library.encode([text.upper() for text in texts]))

    monkeypatch.setattr(engines, "open_library", open_library)
    first = choose_engine(huggingface_path)
    assert first.name == "reference"
    assert choose_engine(huggingface_path).report == first.report
    assert len(comparisons) == 1


def _other_tokenizer(path: Path, _: pytest.MonkeyPatch) -> Path:
    definition = json.loads(path.read_text())
    definition["added_tokens"] = definition["added_tokens"][:-1]
    other = path.with_name("other.json")
    other.write_text(json.dumps(definition))
    return other


def _other_library(path: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.setattr(engine_verdicts, "library_version", lambda _: "99")
    return path


def _other_reference(path: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.setattr(engine_verdicts, "version", lambda _: "99")
    return path


def _other_processor(path: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.setattr(engine_verdicts, "_processor", lambda: "of another kind")
    return path


@pytest.mark.parametrize("change", [_other_tokenizer, _other_library, _other_reference, _other_processor])
def test_what_has_changed_is_compared_again(
    change: Callable[[Path, pytest.MonkeyPatch], Path],
    huggingface_path: Path,
    cache: Path,
    comparisons: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose_engine(huggingface_path)
    path = change(huggingface_path, monkeypatch)
    assert choose_engine(path).name == "fastokens"
    assert len(comparisons) == 2


def test_the_texts_of_the_user_are_compared_each_time(
    huggingface_path: Path, cache: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what one corpus refuses is not refused for others."""
    assert choose_engine(huggingface_path, sample_texts=texts[:2]).name == "fastokens"
    honest = engines.open_library

    def open_library(name: str, path: Path) -> Library:
        library = honest(name, path)
        return library._replace(
            encode=lambda given: library.encode([text for text in given if text != texts[3]] + [""])
        )

    with monkeypatch.context() as patch:
        patch.setattr(engines, "open_library", open_library)
        assert choose_engine(huggingface_path, sample_texts=texts[:5]).name == "reference"
    assert choose_engine(huggingface_path, sample_texts=texts[:2]).name == "fastokens"


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_time_only(
    huggingface_path: Path, cache: Path, comparisons: list[str]
) -> None:
    choose_engine(huggingface_path)
    (remembered,) = _kept_in(cache)
    of_another_version = b'{"refused": 3}'
    checksum = xxhash.xxh3_128_hexdigest(of_another_version).encode()
    whole = remembered.read_bytes()
    for damage in (b"", b"\0" * 40, whole[:-1], checksum + b"\n" + of_another_version):
        remembered.write_bytes(damage)
        assert choose_engine(huggingface_path).name == "fastokens"
    assert len(comparisons) == 5
    assert Verdicts(load_tokenizer(huggingface_path).fingerprint).get("fastokens") is not None

    remembered.unlink()
    remembered.parent.rmdir()
    remembered.parent.write_text("a file where the directory should be")
    for _ in range(2):
        assert choose_engine(huggingface_path).name == "fastokens"
    assert len(comparisons) == 7


def test_failures_are_not_remembered(huggingface_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that could start no thread may do so the next time."""

    def fail(texts: list[str]) -> Any:
        raise RuntimeError("no thread could be started")

    with monkeypatch.context() as patch:
        patch.setattr(engines, "open_library", lambda name, *_: Library(name, fail))
        assert choose_engine(huggingface_path).name == "reference"
    assert not _kept_in(cache)
    assert choose_engine(huggingface_path).name == "fastokens"
    assert isinstance(Verdicts(load_tokenizer(huggingface_path).fingerprint).get("fastokens"), Verdict)

"""Engines: ids are the reference's, or the engine is not used; a difference during the run ends it."""

import builtins
import functools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import tokenizers
from tokenizer_kinds import KINDS
from tokenizers import pre_tokenizers

from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers import engine_libraries, engines
from illada_megatron.data.tokenizers.engine_libraries import ENGINE_NAMES, FlatIds, Library, UnsuitableError, flatten
from illada_megatron.data.tokenizers.engine_probes import probe_texts
from illada_megatron.data.tokenizers.engines import choose_engine, open_engine
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

Chosen = Callable[[str], engines.Engine]


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def chosen(paths: dict[str, Path]) -> Chosen:
    """choose_engine(paths[kind]), once."""
    return functools.cache(lambda kind: choose_engine(paths[kind]))


def same(found: FlatIds, expected: list[list[int]]) -> bool:
    tokens, lengths = flatten(expected)
    return np.array_equal(found[0], tokens) and np.array_equal(found[1], lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_gives_the_references_ids(
    kind: str, paths: dict[str, Path], chosen: Chosen, awkward_texts: list[str]
) -> None:
    """On texts that were not part of the choice."""
    engine = chosen(kind)
    reference = load_tokenizer(paths[kind])
    assert engine.name in ENGINE_NAMES
    assert engine.report[-1].startswith(f"tokenizer engine {engine.name}")
    assert same(engine.encode(awkward_texts), reference.encode_batch(awkward_texts))
    others = probe_texts(reference, ["<mask>", "<|im_start|>"], seed=1)
    assert same(engine.encode(others), reference.encode_batch(others))


def test_auto_takes_a_fast_library(chosen: Chosen) -> None:
    """What the figures in docs/log.md rest on."""
    for library in ("fastokens", "gigatoken"):
        pytest.importorskip(library)
    assert chosen("gpt2").name == "fastokens"
    assert chosen("gpt4").name == "fastokens"
    assert chosen("sentencepiece").name == "gigatoken"


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "gpt2"])
@pytest.mark.parametrize("name", ENGINE_NAMES[2:])
def test_an_engine_asked_for_by_name_serves_or_is_refused(
    name: str, kind: str, paths: dict[str, Path], awkward_texts: list[str]
) -> None:
    refusal: DataError | None = None
    try:
        engine = choose_engine(paths[kind], name, sample_texts=awkward_texts[:50])
    except DataError as error:
        refusal = error
    if refusal is not None:
        assert re.search(f"tokenizer engine {name} refused: .*reference, which always serves", str(refusal), re.DOTALL)
        return
    assert engine.name == name
    reference = load_tokenizer(paths[kind])
    assert same(engine.encode(awkward_texts), reference.encode_batch(awkward_texts))


def test_special_tokens_in_text_are_text(paths: dict[str, Path], chosen: Chosen) -> None:
    for kind in ("sentencepiece", "unigram", "gpt2", "qwen"):
        tokenizer = load_tokenizer(paths[kind])
        tokens, _ = chosen(kind).encode(["a</s>b<mask>", "<|endoftext|><|mdm_mask|>", "<s><pad><sep><unk>"])
        assert not {tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id} & set(tokens.tolist()), kind


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "qwen"])
@pytest.mark.parametrize("texts_given", [[], [""], ["", "a", "", "\u2581", ""], ["\u2581\u2581"], ["\u180e"]])
def test_empty_texts_keep_their_place(
    kind: str, texts_given: list[str], paths: dict[str, Path], chosen: Chosen
) -> None:
    reference = load_tokenizer(paths[kind])
    for engine in (chosen(kind), open_engine(paths[kind], "reference")):
        found = engine.encode(texts_given)
        assert (found[0].dtype, found[1].dtype) == (np.int32, np.int64)
        assert same(found, reference.encode_batch(texts_given))


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2"])
def test_threads_share_an_engine(kind: str, paths: dict[str, Path], chosen: Chosen, awkward_texts: list[str]) -> None:
    engine = chosen(kind)
    expected = load_tokenizer(paths[kind]).encode_batch(awkward_texts)
    parts = [slice(start, start + 7) for start in range(0, len(awkward_texts), 7)] * 3
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda part: engine.encode(awkward_texts[part]), parts))
    assert all(same(ids, expected[part]) for ids, part in zip(found, parts, strict=True))


def lying(wrong: Callable[[str], bool]) -> Callable[[str, Path, int], Library]:
    """open_library, except that its libraries give one wrong id where `wrong(text)`."""
    honest = engine_libraries.open_library

    def open_liar(name: str, path: Path) -> Library:
        library = honest(name, path)

        def encode(texts: list[str]) -> FlatIds:
            tokens, lengths = library.encode(texts)
            tokens, ends = tokens.copy(), np.cumsum(lengths)
            for text, end, length in zip(texts, ends, lengths, strict=True):
                if wrong(text) and length:
                    tokens[end - 1] ^= 1
            return tokens, lengths

        return library._replace(encode=encode)

    return open_liar


@pytest.mark.parametrize("about", ["a probe", "a sample"])
@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2"])
def test_a_lie_is_caught(
    kind: str, about: str, paths: dict[str, Path], chosen: Chosen, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = chosen(kind).name
    lies = {"a probe": lambda text: "👩‍👩‍👧‍👦" in text, "a sample": lambda text: text == texts[3]}
    monkeypatch.setattr(engines, "open_library", lying(lies[about]))
    engine = choose_engine(paths[kind], sample_texts=texts[:5])
    assert engine.name == "reference"
    assert any(f"engine {name} refused: it gave other ids than the reference" in line for line in engine.report)
    with pytest.raises(DataError, match=f"{name} refused: it gave other ids.*from its token [0-9]+ on"):
        choose_engine(paths[kind], name, sample_texts=texts[:5])


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2"])
def test_a_lie_during_the_run_is_caught_by_the_audit(
    kind: str, paths: dict[str, Path], chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kind of document in four is wrong: among some thousand the audit meets one."""
    name = chosen(kind).name
    monkeypatch.setattr(engines, "open_library", lying(lambda text: text.startswith("document") and text[-1] in "05"))
    engine = open_engine(paths[kind], name)
    documents = [f"document number {number}" for number in range(20_000)]
    with pytest.raises(DataError, match=r"other ids than the reference for the document that begins 'document num"):
        engine.encode(documents)


def test_the_audit_takes_its_share_and_always_the_same(
    paths: dict[str, Path], chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited: list[list[str]] = []
    honest = engines.open_reference

    def open_reference(tokenizer: Any) -> Library:
        library = honest(tokenizer)
        return library._replace(encode=lambda texts: (audited.append(texts), library.encode(texts))[1])

    monkeypatch.setattr(engines, "open_reference", open_reference)
    engine = open_engine(paths["gpt2"], chosen("gpt2").name)
    audited.clear()
    documents = [f"text {number}" for number in range(100_000)]
    for _ in range(2):
        for start in range(0, len(documents), 10_000):
            engine.encode(documents[start : start + 10_000])
    half = len(audited) // 2
    assert audited[:half] == audited[half:]
    assert sum(map(len, audited[:half])) == pytest.approx(100_000 * engines.AUDITED_SHARE, rel=0.4)


def test_failures_of_a_library_end_the_run(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic of Rust is no Exception, and an answer about fewer documents would shift all that follow."""

    class PanicException(BaseException):
        pass

    def panic(texts: list[str]) -> FlatIds:
        raise PanicException("index out of bounds")

    def short(texts: list[str]) -> FlatIds:
        return np.zeros(3, np.int32), np.full(max(len(texts) - 1, 0), 3)

    for encode, message in (
        (panic, "failed: index out of bounds"),
        (short, "gave 1 documents and 3 tokens, expected 2"),
    ):
        monkeypatch.setattr(engines, "open_library", lambda *_, encode=encode: Library("fastokens", encode))
        with pytest.raises(DataError, match=f"{message}.*--tokenizer-engine reference"):
            open_engine(paths["gpt2"], "fastokens").encode(["a", "b"])
        assert choose_engine(paths["gpt2"]).name == "reference"


def test_missing_packages_are_reported(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the reference's own libraries are needed."""
    real_import = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("fastokens", "gigatoken"):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert choose_engine(paths["gpt2"]).name == "reference"
    engine = choose_engine(paths["sentencepiece"])
    assert engine.name == "sentencepiece"
    assert "gigatoken refused: not installed" in engine.report[0]
    with pytest.raises(DataError, match="fastokens refused: not installed"):
        choose_engine(paths["gpt2"], "fastokens")
    with pytest.raises(DataError, match="fastokens not installed"):
        open_engine(paths["gpt2"], "fastokens")


def _opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the libraries as they are opened, ahead or not."""
    opened: list[str] = []
    honest = engine_libraries._opened

    def open_it(name: str, path: Path, content: bytes) -> Library:
        opened.append(name)
        return honest(name, path, content)

    monkeypatch.setattr(engine_libraries, "_opened", open_it)
    return opened


def test_a_library_is_opened_ahead_once(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was opened of a file is not used for another file of its name."""
    opened = _opened(monkeypatch)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(paths["gpt2"].read_bytes())
    for _ in range(2):
        engine_libraries.open_ahead("auto", path)
    assert open_engine(path, "fastokens").encode(["a b c"])[0].tolist() == load_tokenizer(paths["gpt2"]).encode("a b c")
    assert opened == ["fastokens"]
    engine_libraries.open_ahead("fastokens", path)
    path.write_bytes(paths["gpt4"].read_bytes())
    assert open_engine(path, "fastokens").encode(["a b c"])[0].tolist() == load_tokenizer(paths["gpt4"]).encode("a b c")
    assert opened == ["fastokens"] * 3


def test_errors_of_opening_ahead_come_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    engine_libraries.open_ahead("auto", path)  # no such file
    path.write_text("{}")
    engine_libraries.open_ahead("auto", path)
    engine_libraries.open_ahead("no such engine", path)
    with pytest.raises(UnsuitableError, match="cannot read this tokenizer"):
        engine_libraries.open_library("fastokens", path)


@pytest.mark.parametrize("name", ["fastokens", "gigatoken"])
def test_a_huge_id_is_refused_before_a_library_makes_room_for_it(
    name: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    """It would end the process, which has no such memory."""
    pytest.importorskip(name)
    for place in ("vocab", "added"):
        definition = orjson.loads(paths["gpt2"].read_bytes())
        if place == "vocab":
            definition["model"]["vocab"]["huge"] = 2**31
        else:
            definition["added_tokens"].append({**definition["added_tokens"][0], "id": 2**31, "content": "huge"})
        path = tmp_path / f"{place}.json"
        path.write_bytes(orjson.dumps(definition))
        with pytest.raises(UnsuitableError, match="its largest id is 2147483648, expected less than"):
            engine_libraries.open_library(name, path)
    definition = orjson.loads(paths["gpt2"].read_bytes())
    path.write_bytes(orjson.dumps({**definition, "added_tokens": []}))
    engine_libraries.open_library(name, path)


def test_a_model_is_turned_into_gigatokens_form_once(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    """And again where what was kept is damaged."""
    pytest.importorskip("gigatoken")
    made: list[int] = []
    honest = engine_libraries._definition_for_gigatoken

    def definition(content: bytes) -> dict[str, Any]:
        made.append(len(content))
        return honest(content)

    monkeypatch.setattr(engine_libraries, "_definition_for_gigatoken", definition)
    expected = load_tokenizer(paths["sentencepiece"]).encode_batch(texts[:20])
    for step, times in (("first", 1), ("again", 1), ("damaged", 2)):
        if step == "damaged":
            (kept,) = (tmp_path / "cache").rglob("gigatoken_definitions/*")
            kept.write_bytes(kept.read_bytes()[:-1])
        assert same(open_engine(paths["sentencepiece"], "gigatoken").encode(texts[:20]), expected)
        assert len(made) == times, step


def test_names(paths: dict[str, Path]) -> None:
    assert choose_engine(paths["gpt2"], "reference").name == "reference"
    with pytest.raises(DataError, match=r"engine is 'fast', expected one of auto, reference, fastokens"):
        choose_engine(paths["gpt2"], "fast")
    with pytest.raises(DataError, match=r"sentencepiece refused: does not serve \.json files"):
        choose_engine(paths["gpt2"], "sentencepiece")
    with pytest.raises(DataError, match="no such file"):
        choose_engine("nowhere.json")


def test_tables_of_unicode_of_another_year_are_seen(paths: dict[str, Path], tmp_path: Path) -> None:
    """gigatoken 0.10 takes U+088F, new in Unicode 17, for a letter, tokenizers for a sign."""
    pytest.importorskip("gigatoken")
    with pytest.raises(DataError, match="gigatoken refused: it gave other ids than the reference for"):
        choose_engine(paths["gpt4"], "gigatoken")
    assert engines.write_boundary_tokenizer(paths["gpt4"], tmp_path / "boundaries.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "boundaries.json"))
    assert tokenizer.encode('a"').tokens == ["a", '"']
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    assert tokenizer.encode('a"').tokens == ['a"']

"""Inputs are what they were planned to be, or the job says so: nothing is left out, read twice or exchanged unsaid."""

import codecs
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing import produce_corpus
from illada_megatron.data.preprocessing.document_encoder import DocumentEncoder
from illada_megatron.data.preprocessing.inputs import described, find_inputs
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.manifest import read_manifest
from illada_megatron.data.tokenizers.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def _documents(manifest: Path, tokenizer: Tokenizer) -> list[str]:
    documents = []
    for shard in read_manifest(manifest).shards:
        dataset = IndexedDataset(manifest.parent / shard.path)
        documents += [tokenizer.decode(dataset.document(i)[:-1]) for i in range(dataset.num_documents)]
    return documents


def _write(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
        path.write_bytes(compress.get(path.suffix, bytes)(_jsonl(texts)))
    return path


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _replace(path: Path) -> None:
    """As a collector does that writes a newer version: whole, by a rename."""
    _write(path.with_name(f"new{path.suffix}"), ["other"] * 7).replace(path)


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.jsonl.zst", "in.parquet"])
@pytest.mark.parametrize("change", [_halve, _replace, Path.unlink])
def test_a_file_that_changes_after_it_was_planned(
    name: str,
    change: Callable[[Path], object],
    sentencepiece_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the bad lines are told to be: the job ends, and publishes nothing of it."""
    path = _write(tmp_path / name, [f"text {i}" for i in range(100)])
    plan_job = produce_corpus.plan_job

    def plan_and_change(*args: Any) -> Any:
        planned = plan_job(*args)
        change(path)
        return planned

    monkeypatch.setattr(produce_corpus, "plan_job", plan_and_change)
    with pytest.raises(DataError, match=rf"{name}: (has changed since the job was planned|is gone, though the job)"):
        preprocess([path], tmp_path / "out", sentencepiece_path, PreprocessOptions(skip_bad_lines=True, workers=1))
    assert not [found.name for found in tmp_path.iterdir() if found.name.startswith("out") and found.suffix != ".lock"]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.zst"])
def test_a_file_that_changes_while_it_is_read(
    name: str, texts: list[str], sentencepiece_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that is still written. Of a compressed file no part is published that ends after the change."""
    monkeypatch.setattr("illada_megatron.data.preprocessing.chunks.CHUNK_BYTES", 100_000)
    monkeypatch.setattr("illada_megatron.data.preprocessing.shard_task.CHUNK_BYTES", 100_000)
    path = _write(tmp_path / name, texts)
    encode = DocumentEncoder.encode
    shards: list[list[Path]] = []

    def encode_and_append(self: DocumentEncoder, some: list[str]) -> Any:
        result = encode(self, some)
        if not shards:
            with path.open("ab") as stream:
                stream.write(path.read_bytes())
        shards.append(list(tmp_path.glob("out*.idx")))
        return result

    monkeypatch.setattr(DocumentEncoder, "encode", encode_and_append)
    options = PreprocessOptions(shard_mb=0.3 if name.endswith("zst") else 512, tokenizer_engine="reference", workers=1)
    with pytest.raises(DataError, match=rf"{name}: has changed since the job was planned"):
        preprocess([path], tmp_path / "out", sentencepiece_path, options)
    assert shards[0] == shards[-1] == list(tmp_path.glob("out*.idx")) == []


def test_a_directory_gives_all_it_holds_or_says_what_not(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    elsewhere = folder / ".cache" / "elsewhere"
    for directory in (elsewhere, folder / "sub"):
        directory.mkdir(parents=True)
    for name in ("a.JSONL", "b.Txt.GZ", "c.jsonl.bz2", "notes.md", "LICENSE", ".hidden.jsonl", ".cache/d.jsonl"):
        (folder / name).touch()
    (elsewhere / "linked.jsonl").touch()
    (folder / "sub" / "to_elsewhere").symlink_to(elsewhere)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "sub" / "broken.jsonl").symlink_to(folder / "nowhere")
    found = find_inputs([folder])
    assert [
        (Path(file.path).relative_to(folder).as_posix(), file.format, file.compression) for file in found.files
    ] == [
        ("a.JSONL", "jsonl", "none"),
        ("b.Txt.GZ", "text", "gzip"),
        ("sub/to_elsewhere/linked.jsonl", "jsonl", "none"),
    ]
    assert +found.left_out == {
        **{".bz2": 1, ".md": 1, "no suffix": 1, "hidden": 2},
        **{"no regular files (broken links, pipes)": 1},
    }


def test_what_was_left_out_is_said(sentencepiece_path: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    _write(tmp_path / "in" / "a.jsonl", ["text"])
    (tmp_path / "in" / "b.jsonl.bz2").touch()
    run = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(tmp_path / "in")]
    run += ["--output-prefix", str(tmp_path / "out"), "--tokenizer-model", str(sentencepiece_path)]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "left out of directories and globs: 1 .bz2" in done.stdout
    assert "left out of directories and globs: 1 .bz2" in done.stderr


def test_a_file_that_two_paths_reach_is_refused(tmp_path: Path) -> None:
    """Unless it is named itself each time: then it is meant."""
    path = _write(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.jsonl").symlink_to(path)
    for paths in ([path, tmp_path / "*.jsonl"], [tmp_path / "*.jsonl", path], [tmp_path / "in" / "*", path]):
        with pytest.raises(DataError, match=r"jsonl: is reached by .* and by .*, expected once"):
            find_inputs(paths)
    assert len(find_inputs([path, path]).files) == 2


def test_two_links_to_one_file_are_read_once(tmp_path: Path) -> None:
    """As the cache of Hugging Face has them, where two names have the same content."""
    for folder in (tmp_path / "blobs", tmp_path / "names"):
        folder.mkdir()
    path = _write(tmp_path / "blobs" / "0123", ["text"])
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "names" / name).symlink_to(path)
    for given in (tmp_path, tmp_path / "names" / "*"):
        found = find_inputs([given])
        assert [Path(file.path).name for file in found.files] == ["a.jsonl"]
        assert found.left_out["links to files that are read already"] == 1


def test_links_out_of_a_directory_are_left_out_and_named(tmp_path: Path) -> None:
    """An archive of others could hold a link to anything; what is given itself is meant."""
    private, folder = tmp_path / "private", tmp_path / "in"
    for directory in (private, folder):
        directory.mkdir()
    _write(private / "diary.jsonl", ["secret"])
    _write(folder / "a.jsonl", ["text"])
    (folder / "part").symlink_to(private)
    (folder / "part.jsonl").symlink_to(private / "diary.jsonl")
    (folder / "above").symlink_to("..")
    (tmp_path / "link").symlink_to(folder)
    for given in (folder, tmp_path / "link"):
        found = find_inputs([given])
        assert [Path(file.path).name for file in found.files] == ["a.jsonl"]
        said = described(found.left_out)
        assert said.startswith("3 links that lead out of the directory (")
        for name in ("part", "part.jsonl", "above"):
            assert str(given / name) in said
    assert [Path(file.path).name for file in find_inputs([folder / "part"]).files] == ["diary.jsonl"]


FIND = """
import sys
from illada_megatron.data.preprocessing.inputs import described, find_inputs
found = find_inputs([sys.argv[1]])
print(len(found.files), described(found.left_out))
"""
# the administrator may read everything, unless he gives that up
NOT_ALL = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.mark.skipif(NOT_ALL != [] and shutil.which("setpriv") is None, reason="needs setpriv to give up rights")
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_that_may_not_be_read_is_left_out_and_named(mode: int, tmp_path: Path) -> None:
    """As lost+found is."""
    folder = tmp_path / "in"
    (folder / "lost+found").mkdir(parents=True)
    _write(folder / "a.jsonl", ["text"])
    _write(folder / "lost+found" / "b.jsonl", ["text"])
    run, environment = [*NOT_ALL, sys.executable, "-c", FIND, str(folder)], {**os.environ, "PYTHONPATH": str(ROOT)}
    (folder / "lost+found").chmod(mode)
    try:
        done = subprocess.run(run, capture_output=True, text=True, env=environment)
    finally:
        (folder / "lost+found").chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"1 1 folders without permission ({folder}/lost+found)\n"


@pytest.mark.parametrize("input_format", ["auto", "jsonl"])
def test_an_output_within_the_input_is_never_read(
    input_format: Any, sentencepiece_path: Path, sentencepiece_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Again it is the finished job, and with --overwrite the same one: not a corpus made of the last one's records."""
    texts = [f"text {i}" for i in range(100)]
    for i in range(4):
        _write(tmp_path / f"{i}.json", texts[25 * i : 25 * (i + 1)])
    options = PreprocessOptions(shard_mb=0.0005, workers=1, input_format=input_format, tokenizer_engine="reference")
    made = preprocess([tmp_path], tmp_path / "out", sentencepiece_path, options)
    assert made.shards == 4
    assert preprocess([tmp_path], tmp_path / "out", sentencepiece_path, options).was_finished
    again = PreprocessOptions(**{**vars(options), "overwrite": True})
    for paths in ([tmp_path], [tmp_path / "*.json"]):
        preprocess(paths, tmp_path / "out", sentencepiece_path, again)
        assert _documents(made.manifest, sentencepiece_tokenizer) == texts
    with pytest.raises(DataError, match=r"out\.manifest\.json: is both input and, .* output"):
        preprocess([made.manifest], tmp_path / "out", sentencepiece_path, again)
    assert _documents(made.manifest, sentencepiece_tokenizer) == texts


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk_bytes", [1, 2, 1 << 20])
def test_a_byte_order_mark_is_no_text(
    suffix: str,
    chunk_bytes: int,
    sentencepiece_path: Path,
    sentencepiece_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the start of a file only, whatever the file holds and however it is read."""
    monkeypatch.setattr("illada_megatron.data.preprocessing.chunks.CHUNK_BYTES", chunk_bytes)
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    contents = {"a.jsonl": _jsonl(["\ufeffone", "two"]), "b.txt": "three \ufeff\n".encode(), "c.txt": b""}
    for name, content in contents.items():
        (tmp_path / f"{name}{suffix}").write_bytes(compress.get(suffix, bytes)(codecs.BOM_UTF8 + content))
    paths = [tmp_path / f"{name}{suffix}" for name in contents]
    options = PreprocessOptions(shard_mb=0.00002, workers=1, tokenizer_engine="reference")
    made = preprocess(paths, tmp_path / "out", sentencepiece_path, options)
    assert _documents(made.manifest, sentencepiece_tokenizer) == ["\ufeffone", "two", "three \ufeff\n"]


def _column(kind: str, values: list[bytes | None]) -> pyarrow.Array:
    if kind == "dictionary":
        column = pyarrow.array(values, pyarrow.binary()).dictionary_encode()
        return pyarrow.DictionaryArray.from_arrays(column.indices, column.dictionary.view(pyarrow.string()))
    if kind in ("string", "large_string"):
        return pyarrow.array(values, f"large_{'binary'}" if kind.startswith("l") else "binary").view(kind)
    if kind == "string_view":
        return pyarrow.array(values, pyarrow.binary_view()).view(pyarrow.string_view())
    return pyarrow.array(values, getattr(pyarrow, kind)())


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "dictionary", "binary", "large_binary", "binary_view"]
)
def test_columns_of_every_kind_of_text(
    kind: str, sentencepiece_path: Path, sentencepiece_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Too long, null, not UTF-8: counted alike, and the rows beside them are read."""
    values = [b"good", b"x" * 2000, b"\xff", None, b"good", b"y" * 2000, b"last"]
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": _column(kind, values)}), path)
    assert kind in str(pyarrow.parquet.ParquetFile(path).schema_arrow.field("text").type)
    options = PreprocessOptions(max_document_mb=0.001, skip_bad_lines=True)
    made = preprocess([path], tmp_path / "out", sentencepiece_path, options)
    assert made.counts.dropped == {"too long": 2}
    assert made.counts.bad == {"not UTF-8": 1, "not a string": 1}
    assert _documents(made.manifest, sentencepiece_tokenizer) == ["good", "good", "last"]
    with pytest.raises(DataError, match=r"in\.parquet: row \d: the text is not valid UTF-8"):
        preprocess([path], tmp_path / "other", sentencepiece_path)

"""The same documents in every format give the same shard; a damaged file of each is named and leaves nothing."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.manifest import file_checksum, read_manifest
from illada_megatron.data.tokenizers.tokenizer import Tokenizer

DOCUMENTS = [f"document {i}: naïve ✓ " + "line\n" * (i % 7) for i in range(300)]


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def _zstd_frames(data: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    return zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :])


def _parquet(path: Path, texts: list[str], rows: int = 40) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


def _write(directory: Path, kind: str, texts: list[str]) -> Path:
    path = directory / f"in.{kind}"
    if kind == "parquet":
        return _parquet(path, texts)
    compress: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": _zstd_frames}
    path.write_bytes(compress.get(path.suffix[1:], bytes)(_jsonl(texts)))
    return path


def _stream(manifest_path: Path) -> list[bytes]:
    """The documents' tokens over all shards of a manifest, whose checksums have to be right."""
    documents = []
    for shard in read_manifest(manifest_path).shards:
        prefix = manifest_path.parent / shard.path
        assert shard.bin_xxh3_128 == file_checksum(f"{prefix}.bin")
        assert shard.idx_xxh3_128 == file_checksum(f"{prefix}.idx")
        dataset = IndexedDataset(prefix)
        assert (shard.tokens, shard.documents) == (dataset.num_tokens, dataset.num_documents)
        documents += [dataset.document(i).tobytes() for i in range(dataset.num_documents)]
    return documents


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("shard_mb", [512, 0.005])
def test_formats_give_equal_documents(kind: str, shard_mb: float, sentencepiece_path: Path, tmp_path: Path) -> None:
    """In one shard or in several, cut at lines, row groups or parts."""
    plain = preprocess([_write(tmp_path, "jsonl", DOCUMENTS)], tmp_path / "plain", sentencepiece_path)
    options = PreprocessOptions(shard_mb=shard_mb)
    made = preprocess([_write(tmp_path, kind, DOCUMENTS)], tmp_path / "out", sentencepiece_path, options)
    assert _stream(made.manifest) == _stream(plain.manifest)
    assert made.counts == plain.counts
    assert (made.shards > 1) == (shard_mb < 1 and not kind.endswith(("gz", "zst")))  # parts end with a batch of 2 MB


def test_compressed_input_is_cut_into_parts(
    sentencepiece_path: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task, several shards, the same documents as in one."""
    monkeypatch.setattr("illada_megatron.data.preprocessing.chunks.CHUNK_BYTES", 100_000)
    monkeypatch.setattr("illada_megatron.data.preprocessing.shard_task.CHUNK_BYTES", 100_000)
    path = _write(tmp_path, "jsonl.zst", texts)
    made = preprocess([path], tmp_path / "out", sentencepiece_path, PreprocessOptions(shard_mb=0.3))
    names = [shard.path for shard in read_manifest(made.manifest).shards]
    assert names == [f"out_00000_{i:03d}" for i in range(len(names))]
    assert len(names) > 2
    whole = preprocess([_write(tmp_path, "jsonl", texts)], tmp_path / "whole", sentencepiece_path)
    assert _stream(made.manifest) == _stream(whole.manifest)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_files_are_documents(
    suffix: str, sentencepiece_path: Path, sentencepiece_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """One file, one document, to the last newline; longer ones are cut at line ends; long lines are dropped."""
    texts = ["one\ntwo", "three\n", "", "x" * 50 + "\n" + "a line\n" * 40 + "y" * 2000 + "\nend\n"]
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt{suffix}").write_bytes(compress.get(suffix, bytes)(text.encode()))
    options = PreprocessOptions(max_document_mb=0.0001)
    made = preprocess([tmp_path / f"*.txt{suffix}"], tmp_path / "out", sentencepiece_path, options)
    (shard,) = read_manifest(made.manifest).shards
    dataset = IndexedDataset(tmp_path / shard.path)
    found = [sentencepiece_tokenizer.decode(dataset.document(i)[:-1]) for i in range(dataset.num_documents)]
    assert found[:2] == texts[:2]
    assert "".join(found[2:]) == texts[3].replace("y" * 2000 + "\n", "")
    assert all(len(text) <= 100 for text in found)
    assert made.counts.dropped == {"too long": 1}


def test_long_documents_are_dropped_and_counted(sentencepiece_path: Path, tmp_path: Path) -> None:
    texts = ["short", "long " * 1000, "short", "x" * 1000]
    options = PreprocessOptions(max_document_mb=0.0005)
    for kind in ("jsonl", "jsonl.gz", "parquet"):
        made = preprocess([_write(tmp_path, kind, texts)], tmp_path / kind, sentencepiece_path, options)
        assert made.counts.dropped == {"too long": 2}
        assert made.counts.documents == 2


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_files_are_named(kind: str, damage: str, sentencepiece_path: Path, tmp_path: Path) -> None:
    path = _write(tmp_path, kind, DOCUMENTS)
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-20], "garbage": b"\x00" * 100 + data, "empty": b""}[damage])
    with pytest.raises(DataError, match=rf"in\.{kind}: expected a whole (gzip|zstd|Parquet) file"):
        preprocess([path], tmp_path / "out", sentencepiece_path)
    assert {found.name for found in tmp_path.iterdir()} - {"out.lock"} == {path.name}


def test_bad_rows_are_named_or_counted(sentencepiece_path: Path, tmp_path: Path) -> None:
    """Parquet: a null, and bytes that are no UTF-8 (pyarrow does not check them). Text: the file."""
    column = pyarrow.array([b"good", None, b"\xff", b"good"], type=pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=r"in\.parquet: row 1: the key 'text' holds null"):
        preprocess([path], tmp_path / "out", sentencepiece_path)
    made = preprocess([path], tmp_path / "out", sentencepiece_path, PreprocessOptions(skip_bad_lines=True))
    assert made.counts.documents == 2
    assert made.counts.bad == {"not UTF-8": 1, "not a string": 1}
    with pytest.raises(DataError, match=r"in\.parquet: the column 'content' is missing, found 'text'"):
        preprocess([path], tmp_path / "other", sentencepiece_path, PreprocessOptions(text_key="content"))
    (tmp_path / "in.txt").write_bytes(b"latin \xe9")
    with pytest.raises(DataError, match=r"in\.txt: the text is not valid UTF-8"):
        preprocess([tmp_path / "in.txt"], tmp_path / "other", sentencepiece_path)


def test_a_bad_line_of_a_later_range_has_its_number(sentencepiece_path: Path, tmp_path: Path) -> None:
    lines = ['{"text": "good"}'] * 1000
    lines[900] = "{bad"
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    for workers in (1, 2):
        options = PreprocessOptions(shard_mb=0.003, workers=workers)
        with pytest.raises(DataError, match=r"in\.jsonl:901: not valid JSON"):
            preprocess([path], tmp_path / "out", sentencepiece_path, options)
        assert not list(tmp_path.glob("*.tmp"))
    repaired = preprocess(
        [path], tmp_path / "out", sentencepiece_path, PreprocessOptions(shard_mb=0.003, skip_bad_lines=True)
    )
    assert repaired.counts.documents == 999
    assert repaired.resumed_tasks > 0


def test_unknown_names_and_a_missing_pyarrow(
    sentencepiece_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.dat").write_text('{"text": "good"}')
    with pytest.raises(DataError, match=r"in\.dat: the name ends in '\.dat', expected \.jsonl.*--input-format"):
        preprocess([tmp_path / "in.dat"], tmp_path / "out", sentencepiece_path)
    options = PreprocessOptions(input_format="jsonl")
    assert preprocess([tmp_path / "in.dat"], tmp_path / "out", sentencepiece_path, options).counts.documents == 1
    _parquet(tmp_path / "in.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'illada-megatron\[parquet\]'"):
        preprocess([tmp_path / "in.parquet"], tmp_path / "other", sentencepiece_path)

"""Text to shards: every document once, in order; every bad line said or counted; nothing half-written."""

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess
from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[3]
GOOD = '{"text": "good"}'
BAD_LINES = [
    ("{not json}", "not valid JSON"),
    ('{"text": "cut off', "not valid JSON"),
    (b'{"text": "\xff\xfe"}', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"text": ' + "1" * 5000 + "}", "not valid JSON"),
    ('"a string"', "found a string, expected an object with the key 'text'"),
    ("[1, 2]", "found a list, expected an object"),
    ("null", "found null, expected an object"),
    ('{"content": "x", "id": 3}', "the key 'text' is missing, found 'content', 'id'"),
    ("{}", "the key 'text' is missing, found no keys"),
    ('{"text": 5}', "the key 'text' holds a number, expected a string"),
    ('{"text": null}', "the key 'text' holds null, expected a string"),
    ('{"text": ["a"]}', "the key 'text' holds a list, expected a string"),
    (r'{"text": "half a pair \ud83d"}', "not valid JSON.*surrogate"),
]


def _write(path: Path, lines: list[str | bytes]) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_every_document_in_order_with_its_end(
    kind: str, request: pytest.FixtureRequest, texts: list[str], jsonl: Path, tmp_path: Path
) -> None:
    """The shard decodes to the very texts that went in; batching (2 MB) and several inputs leave no seam."""
    path = request.getfixturevalue(f"{kind}_path")
    tokenizer = load_tokenizer(path)
    summary = preprocess([jsonl] * 6, tmp_path / "made" / "shard", path)
    dataset = IndexedDataset(tmp_path / "made" / "shard")
    assert summary.counts.documents == dataset.num_documents == 6 * len(texts)
    assert summary.counts.tokens == dataset.num_tokens
    assert summary.counts.text_bytes == 6 * sum(len(text.encode()) for text in texts) > 4 << 20
    assert (summary.counts.bad, summary.counts.dropped) == ({}, {})
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        *("shard.bin", "shard.idx", "shard.job.json", "shard.lock", "shard.manifest.json")
    ]
    for i in range(dataset.num_documents):
        *ids, last = dataset.document(i).tolist()
        assert last == tokenizer.eos_id
        assert tokenizer.decode(ids) == texts[i % len(texts)]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_that_are_skipped_have_places(workers: int, sentencepiece_path: Path, tmp_path: Path) -> None:
    """In pieces of a file, which do not know the numbers of their lines, in a compressed file, and after a resume; the
    first ten, in the order of the input."""
    lines: list[str | bytes] = [json.dumps({"text": f"line {number} " + "x" * (number % 90)}) for number in range(400)]
    bad = [7, 8, 150, 151, 390, 399]
    for number in bad:
        lines[number] = "{broken"
    first = _write(tmp_path / "a.jsonl", lines)
    second = tmp_path / "b.jsonl.gz"
    second.write_bytes(gzip.compress(b'{"text": "good"}\n\n[]\n' + b"null\n" * 20))
    options = PreprocessOptions(skip_bad_lines=True, shard_mb=0.003, workers=workers)
    expected = [f"{first}:{number + 1}" for number in bad] + [f"{second}:{number}" for number in range(3, 7)]
    for _ in range(2):  # the second time everything is finished
        summary = preprocess([first, second], tmp_path / "out", sentencepiece_path, options)
        assert summary.tasks > 4
        assert sum(summary.counts.bad.values()) == 27
        assert summary.bad_places() == expected
    assert summary.was_finished


def test_documents_without_end_and_another_key(
    sentencepiece_path: Path, sentencepiece_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = _write(tmp_path / "in.jsonl", [json.dumps({"content": text, "text": 5}) for text in ("one\n", "two")])
    preprocess([path], tmp_path / "shard", sentencepiece_path, PreprocessOptions(text_key="content", append_eod=False))
    dataset = IndexedDataset(tmp_path / "shard")
    assert [sentencepiece_tokenizer.decode(dataset.document(i)) for i in range(2)] == ["one\n", "two"]
    assert sentencepiece_tokenizer.eos_id not in dataset.read(0, dataset.num_tokens)


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_stops_with_file_and_number(
    sentencepiece_path: Path, tmp_path: Path, line: str | bytes, message: str
) -> None:
    good = _write(tmp_path / "good.jsonl", [GOOD])
    bad = _write(tmp_path / "bad.jsonl", [GOOD, "", line, GOOD])
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: {message}[\s\S]*--skip-bad-lines"):
        preprocess([good, bad], tmp_path / "shard", sentencepiece_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl", "shard.lock"]


def test_bad_lines_are_skipped_and_counted_on_demand(
    sentencepiece_path: Path, sentencepiece_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Every good line around the bad ones is kept: 14 bad, 15 good, 1 empty, 2 blank."""
    lines: list[str | bytes] = [GOOD, '{"text": ""}', "", "  "]
    for line, _ in BAD_LINES:
        lines += [line, GOOD]
    path = _write(tmp_path / "in.jsonl", lines)
    counts = preprocess([path], tmp_path / "shard", sentencepiece_path, PreprocessOptions(skip_bad_lines=True)).counts
    assert counts.documents == 15
    assert counts.bad == {"not JSON": 6, "not an object": 3, "key missing": 2, "not a string": 3}
    assert counts.dropped == {"empty": 1}
    dataset = IndexedDataset(tmp_path / "shard")
    assert {sentencepiece_tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)} == {"good"}


def test_last_line_without_newline_is_read(sentencepiece_path: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(GOOD + "\n" + GOOD)
    assert preprocess([tmp_path / "in.jsonl"], tmp_path / "shard", sentencepiece_path).counts.documents == 2


def test_separators_of_other_conventions_do_not_cut_a_line(
    sentencepiece_path: Path, sentencepiece_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """U+2028 and U+0085 may stand unescaped in JSON; str.splitlines would break the line there."""
    text = "a\u2028b\u0085c\x7fd"
    path = _write(tmp_path / "in.jsonl", [json.dumps({"text": text}, ensure_ascii=False)])
    preprocess([path], tmp_path / "shard", sentencepiece_path)
    assert sentencepiece_tokenizer.decode(IndexedDataset(tmp_path / "shard").document(0)) == text


@pytest.mark.parametrize("lines", [[], ["", " "], ['{"text": ""}'], ["{bad", "null"]])
def test_no_documents_is_an_error_and_leaves_nothing(
    sentencepiece_path: Path, tmp_path: Path, lines: list[str | bytes]
) -> None:
    empty = _write(tmp_path / "empty.jsonl", lines)
    with pytest.raises(DataError, match=r"no documents: .*nothing was written"):
        preprocess([empty], tmp_path / "shard", sentencepiece_path, PreprocessOptions(skip_bad_lines=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "shard.lock"]


def test_missing_input_is_noticed_before_any_work(sentencepiece_path: Path, tmp_path: Path) -> None:
    good = _write(tmp_path / "good.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        preprocess([good, tmp_path / "nowhere.jsonl"], tmp_path / "out" / "shard", sentencepiece_path)
    with pytest.raises(DataError, match="no input was given"):
        preprocess([], tmp_path / "out" / "shard", sentencepiece_path)
    assert [path.name for path in tmp_path.iterdir()] == ["good.jsonl"]


def test_tokenizer_without_an_end_is_an_error(texts: list[str], tmp_path: Path) -> None:
    """Documents that run into each other unmarked are never what --append-eod asked for."""
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.train_from_iterator(texts[:3], tokenizers.trainers.BpeTrainer(vocab_size=200, show_progress=False))
    plain.save(str(tmp_path / "tokenizer.json"))
    path = _write(tmp_path / "in.jsonl", [GOOD])
    with pytest.raises(DataError, match="no end-of-document token"):
        preprocess([path], tmp_path / "shard", tmp_path / "tokenizer.json")


def test_progress_bar_shows_both_rates(sentencepiece_path: Path, jsonl: Path, tmp_path: Path, capsys) -> None:
    preprocess([jsonl], tmp_path / "shard", sentencepiece_path, PreprocessOptions(show_progress=True))
    output = capsys.readouterr().err
    assert "100%" in output
    assert "MB/s" in output
    assert "tokens/s" in output


def _tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_tools_from_text_to_shard(jsonl: Path, tmp_path: Path) -> None:
    """The scripts as a user runs them, and their last word on bad input: a message, no traceback, status 2."""
    model, prefix = tmp_path / "t.model", tmp_path / "shard"
    trained = _tool("train_tokenizer.py", "--input", jsonl, "--output", model, "--vocab-size", "800")
    assert trained.returncode == 0, trained.stderr
    common = ["--tokenizer-model", model, "--json-keys", "text", "--append-eod", "--workers", "2"]
    made = _tool("preprocess_data.py", "--input", jsonl, "--input", jsonl, "--output-prefix", prefix, *common)
    assert made.returncode == 0, made.stderr
    dataset = IndexedDataset(prefix)
    assert f"{dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens" in made.stdout
    bad = _write(tmp_path / "bad.jsonl", ["{"])
    failed = _tool("preprocess_data.py", "--input", bad, "--output-prefix", tmp_path / "other", *common)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"illada: error: {bad}:1: not valid JSON")
    assert "Traceback" not in failed.stderr


def test_a_tokenizer_is_on_the_device_and_says_what_it_was_not_made_of(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the device does not take it, the older model stays."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl.read_bytes()[:100_000].rpartition(b"\n")[0])
    (tmp_path / "in" / "b.jsonl.bz2").touch()
    model = train_sentencepiece([tmp_path / "in"], tmp_path / "made" / "t.model", vocab_size=400)
    assert "left out of directories and globs: 1 .bz2" in capfd.readouterr().err
    before = model.read_bytes()

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        train_sentencepiece([tmp_path / "in"], model, vocab_size=350)
    assert [(path.name, path.read_bytes()) for path in model.parent.iterdir()] == [("t.model", before)]

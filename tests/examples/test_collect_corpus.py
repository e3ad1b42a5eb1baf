"""The demo's corpus: real, large enough, the same each time, and nothing of the held-out part in the training part."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "demo" / "collect_corpus.py"
spec = importlib.util.spec_from_file_location("collect_corpus", SCRIPT)
assert spec is not None
assert spec.loader is not None
collect_corpus = importlib.util.module_from_spec(spec)
sys.modules["collect_corpus"] = collect_corpus  # dataclasses look their module up
spec.loader.exec_module(collect_corpus)


def _documents(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_corpus_is_large_split_and_reproducible(tmp_path: Path) -> None:
    summary = collect_corpus.collect(tmp_path / "a")
    train, heldout = _documents(summary.train_path), _documents(summary.heldout_path)
    assert (len(train), len(heldout)) == (summary.train_files, summary.heldout_files)
    sizes = [sum(len(document["text"].encode()) for document in part) for part in (train, heldout)]
    assert sizes == [summary.train_bytes, summary.heldout_bytes]
    assert sum(sizes) >= 10_000_000
    assert 0.015 < sizes[1] / sum(sizes) < 0.08
    assert not {document["text"] for document in train} & {document["text"] for document in heldout}
    assert not any("/test/" in document["path"] or "site-packages" in document["path"] for document in train + heldout)
    assert any(document["path"] == "stdlib/json/decoder.py" for document in train + heldout)
    again = collect_corpus.collect(tmp_path / "b")
    assert again.train_path.read_bytes() == summary.train_path.read_bytes()
    assert again.heldout_path.read_bytes() == summary.heldout_path.read_bytes()


def test_small_library_is_filled_up_and_too_small_is_an_error(tmp_path: Path) -> None:
    """Pythons without sources of their own (some distributions) take other packages, then say what is missing."""
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    (library / "one.py").write_text("x = 1\n")
    (library / "copy.py").write_text("x = 1\n")
    (library / "empty.py").write_text("\n")
    (library / "latin.py").write_bytes(b"# \xe9\n")
    (library / "test" / "left_out.py").write_text("y = 2\n")
    summary = collect_corpus.collect(tmp_path / "tiny", minimum_bytes=1, library=library)
    documents = _documents(summary.train_path) + _documents(summary.heldout_path)
    assert documents == [{"text": "x = 1\n", "path": "stdlib/copy.py"}]
    assert (summary.undecodable_files, summary.duplicate_files) == (1, 1)
    filled = collect_corpus.collect(tmp_path / "filled", minimum_bytes=100_000, library=library)
    assert filled.packages == ("stdlib", "pip")
    assert filled.train_bytes + filled.heldout_bytes >= 100_000
    with pytest.raises(RuntimeError, match="found 6 bytes of Python source in stdlib, expected at least 10000000"):
        collect_corpus.collect(tmp_path / "none", library=library, further_packages=["no_such_package"])
    assert not (tmp_path / "none").exists()

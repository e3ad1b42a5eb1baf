"""A tokenizer by its file, its directory or its name on the hub is the same tokenizer, with the same fingerprint."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.data.tokenizers.finding import find_tokenizer
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]


def _cache(cache: Path, name: str, **files: Path) -> Path:
    """What huggingface_hub leaves on disk: blobs, a snapshot of links to them, and a name for its commit."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file, source in files.items():
        shutil.copy(source, repository / "blobs" / file)
        (repository / "snapshots" / commit / file.replace("_", ".", 1)).symlink_to(f"../../blobs/{file}")
    return repository / "snapshots" / commit


def test_a_directory(sentencepiece_path: Path, huggingface_path: Path, tmp_path: Path) -> None:
    for name, source in [("spiece.model", sentencepiece_path), ("tokenizer.model", sentencepiece_path)]:
        shutil.copy(source, tmp_path / name)
        assert find_tokenizer(tmp_path) == tmp_path / name
        assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(sentencepiece_path).fingerprint
    shutil.copy(huggingface_path, tmp_path / "tokenizer.json")  # an export of ours has both
    assert load_tokenizer(str(tmp_path)).fingerprint == load_tokenizer(huggingface_path).fingerprint
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match=r"empty: a directory without tokenizer\.json, .*found vocab\.json: .*--tok"):
        find_tokenizer(empty, "--tok")


def test_training_into_a_directory(jsonl: Path, tmp_path: Path) -> None:
    assert train_sentencepiece([jsonl], tmp_path, vocab_size=1000) == find_tokenizer(tmp_path)


def test_a_name_that_is_cached(huggingface_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = _cache(tmp_path, "org/words", tokenizer_json=huggingface_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_tokenizer("org/words") == snapshot / "tokenizer.json"
    assert load_tokenizer("org/words").fingerprint == load_tokenizer(huggingface_path).fingerprint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_tokenizer("org/words") == snapshot / "tokenizer.json"
    with pytest.raises(DataError) as refused:
        find_tokenizer("org/other", "--tokenizer")
    for tried in ("no file or directory", f"cache of huggingface_hub ({tmp_path})", "HF_HUB_OFFLINE is set"):
        assert tried in str(refused.value)
    assert "correct --tokenizer, or fetch it where there is a network: hf download org/other" in str(refused.value)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"org/words: no file or directory.*the hub \(http://127\.0\.0\.1:9\) says: "):
        find_tokenizer("org/words")
    for name in ("demo/t.model", "/nowhere/words", "a/b/c", "words"):  # no names of repositories
        with pytest.raises(DataError, match="no such file or directory, expected a tokenizer"):
            find_tokenizer(name)


def test_a_corpus_by_name_in_processes(jsonl: Path, huggingface_path: Path, tmp_path: Path) -> None:
    """HF_HOME says where the cache is; workers find what the parent has found, and the corpus is the same."""
    _cache(tmp_path / "home" / "hub", "org/words", tokenizer_json=huggingface_path)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_CACHE", None)
    for name, tokenizer in [("a", "org/words"), ("b", str(huggingface_path))]:
        command = [sys.executable, "-m", "illada_megatron", "preprocess", str(jsonl), "--output-prefix", name]
        more = ["--tokenizer", tokenizer, "--shard-mb", "0.3", "--workers", "2", "--no-append-eod"]
        done = subprocess.run([*command, *more], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "has no mask token" not in done.stderr
    bins = sorted(tmp_path.glob("a_*.bin"))
    assert len(bins) > 1
    for path in bins:
        assert path.read_bytes() == path.with_name(path.name.replace("a_", "b_")).read_bytes()

"""Shards in object storage, on a real S3 server of this machine: the same samples as from the disk."""

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.corpus.stream import TokenStream
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards import document_index, remote
from illada_megatron.data.shards.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, write_manifest
from illada_megatron.data.shards.shard_list import Shard

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto.server")

LENGTH = 64
BUCKET = "illada-test"


def _put(url: str, content: bytes) -> None:
    from obstore.store import from_url

    _, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    obstore.put(from_url(f"s3://{bucket}"), key, content)


def _documents(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(6, 900, size=length) for length in [*rng.integers(1, 40, size=3000), 1, 500]]


@pytest.fixture(scope="module")
def both(s3: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Manifests of the same three shards: on the disk and in the bucket (under an own prefix)."""
    folder, entries = tmp_path_factory.mktemp("shards"), []
    for number in range(3):
        documents = _documents(number)
        with IndexedDatasetWriter(folder / f"part_{number}", 1000) as writer:
            writer.add(np.concatenate(documents), [len(document) for document in documents])
        shard = IndexedDataset(folder / f"part_{number}")
        entries.append(
            ShardEntry(path=f"part_{number}", dtype="uint16", tokens=shard.num_tokens, documents=shard.num_documents)
        )
        for path in (shard.bin_path, shard.idx_path):
            _put(f"{s3}/web/{path.name}", path.read_bytes())
    manifest = folder / "web.manifest.json"
    write_manifest(Manifest(vocab_size=1000, shards=tuple(entries)), manifest)
    _put(f"{s3}/web/web.manifest.json", manifest.read_bytes())
    return str(manifest), f"{s3}/web/web.manifest.json"


def _corpus(path: str) -> Corpus:
    return Corpus([path], LENGTH, seed=5, shuffle=True, vocab_size=1000)


def test_same_samples_as_from_the_disk(both: tuple[str, str]) -> None:
    """Windows within a shard and across shards, read one by one and by several threads."""
    local, remote = map(_corpus, both)
    indices = list(range(0, local.num_windows, 40))
    for index in indices:
        assert np.array_equal(local[index], remote[index])
        assert np.array_equal(local.document_starts(index), remote.document_starts(index))
    across = [i for i in range(local.num_windows) if local._start(i) // 1000 != (local._start(i) + LENGTH) // 1000]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda index: np.array_equal(local[index], remote[index]), across[:100]))


def test_documents_at_every_offset(both: tuple[str, str]) -> None:
    """The binary search over the object's index: also at the shards' ends."""
    local, remote = map(_corpus, both)
    total = local.num_tokens
    for start in [*range(0, 300, 7), *range(total // 3 - 50, total // 3 + 50), *range(total - 100, total - 1)]:
        for length in (1, 37, 700):
            stop = min(start + length, total)
            assert np.array_equal(
                local._stream.document_starts(start, stop), remote._stream.document_starts(start, stop)
            ), (start, stop)


def test_errors_name_the_object(both: tuple[str, str], s3: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://illada-test/none\.json: cannot be read from object storage"):
        _corpus(f"{s3}/none.json")
    with pytest.raises(DataError, match=r"s3://illada-test/web/part_0: expected a manifest"):
        _corpus(f"{s3}/web/part_0")
    _put(f"{s3}/short/part_0.bin", b"12345678")
    entry = ShardEntry(path=f"{s3}/short/part_0", dtype="uint16", tokens=100, documents=1)
    write_manifest(Manifest(vocab_size=1000, shards=(entry,)), tmp_path / "short.json")
    corpus = _corpus(str(tmp_path / "short.json"))
    with pytest.raises(DataError, match=r"short/part_0\.bin: is 8 bytes long, expected 200"):
        corpus[0]
    with pytest.raises(DataError, match="are mixed in one corpus"):
        Corpus(list(both), LENGTH, seed=5, shuffle=True, vocab_size=1000)


def test_token_outside_the_vocabulary_is_named(both: tuple[str, str]) -> None:
    corpus = Corpus([both[1]], LENGTH, seed=5, shuffle=False, vocab_size=500)
    with pytest.raises(
        DataError, match=r"s3://illada-test/web/part_0\.bin: token id \d+ at token offset \d+ is not in"
    ):
        [corpus[i] for i in range(50)]


class _Counting(BaseHTTPRequestHandler):
    """Object storage over a folder: ranges of its files, and a list of what was asked for."""

    folder: Path
    asked: ClassVar[list[tuple[str, str, int]]] = []

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def _answer(self, with_content: bool) -> None:
        path = self.folder / self.path.split("/")[-1]
        size = path.stat().st_size
        first, last = 0, size - 1
        if named := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(named[1]), min(int(named[2]), size - 1)
        with path.open("rb") as stream:
            stream.seek(first)
            content = stream.read(last + 1 - first) if with_content else b""
        self.asked.append((self.command, path.name, len(content)))
        self.send_response(206 if named else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        if named:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Last-Modified", "Sun, 29 Nov 2026 00:00:00 GMT")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, int]]]:
    """What is asked of s3://counted/NAME, which serves `tmp_path`: (method, NAME, bytes) each."""
    handler = type("Handler", (_Counting,), {"folder": tmp_path, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_SKIP_SIGNATURE": "true",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote, "_stores", {})
        yield handler.asked
        server.shutdown()


def test_requests_of_a_window_are_few(tmp_path: Path, counted: list[tuple[str, str, int]]) -> None:
    """Of a shard of two million documents: one request for a window's tokens, one when its index is first asked, and
    for the documents in it some pieces of 32 KB; for places looked at before, none. What is kept is bounded for the
    process, not for each shard."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(50), 1.2, 2_000_000)).astype(np.int64) + 1
    with IndexedDatasetWriter(tmp_path / "web", 1000) as writer:
        for some in np.array_split(lengths, 20):
            writer.add(np.ones(some.sum(), np.uint16), some)
    total, starts = int(lengths.sum()), np.cumsum(lengths) - lengths
    stream = TokenStream([Shard("s3://counted/web", "uint16", total)])
    spent = []
    places = generator.integers(0, total - 8192, 30).tolist()
    for start in places:
        counted.clear()
        found = stream.document_starts(start, start + 8192)
        assert np.array_equal(found, starts[(starts > start) & (starts < start + 8192)])
        spent.append((len(counted), sum(size for _, _, size in counted)))
        counted.clear()
        stream.read(np.array([start]), np.empty((1, 8192), np.int64), 1000)
        assert counted == [("GET", "web.bin", 2 * 8192)]
    assert spent[0][0] <= 6  # 3 and then 2 to 4 with this seed
    assert np.mean([requests for requests, _ in spent[1:]]) <= 4
    assert np.mean([size for _, size in spent]) <= 1.5e5
    counted.clear()
    for start in places:
        stream.document_starts(start, start + 8192)
    assert counted == []
    kept = remote._piece.cache_info()
    assert kept.maxsize * 8 * document_index._PIECE_ENTRIES <= 64 << 20


def _write(prefix: Path, lengths: np.ndarray) -> None:
    with IndexedDatasetWriter(prefix, 1000) as writer:
        writer.add(np.ones(lengths.sum(), np.uint16), lengths)


def test_an_index_of_other_tokens_is_refused_at_its_first_use(
    tmp_path: Path, counted: list[tuple[str, str, int]]
) -> None:
    """An old .idx beside a newer .bin is right in itself: its boundaries were believed."""
    _write(tmp_path / "stale", np.full(100, 50))
    stream = TokenStream([Shard("s3://counted/stale", "uint16", 5100)])
    for _ in range(2):
        with pytest.raises(DataError, match=r"stale\.idx: lists 5000 tokens, expected 5100 as the manifest says"):
            stream.document_starts(0, 1000)


def test_an_index_that_is_replaced_meanwhile_is_an_error(tmp_path: Path, counted: list[tuple[str, str, int]]) -> None:
    """Pieces of one version and the header of another would be read as one."""
    lengths = np.random.default_rng(0).integers(1, 100, 50_000)
    _write(tmp_path / "web", lengths)
    total, starts = int(lengths.sum()), np.cumsum(lengths) - lengths
    stream = TokenStream([Shard("s3://counted/web", "uint16", total)])
    assert np.array_equal(stream.document_starts(0, 1000), starts[(starts > 0) & (starts < 1000)])
    old = (tmp_path / "web.idx").stat().st_mtime_ns
    _write(tmp_path / "new", lengths[::-1])
    (tmp_path / "new.idx").replace(tmp_path / "web.idx")
    new = (tmp_path / "web.idx").stat().st_mtime_ns
    with pytest.raises(
        DataError, match=rf'web\.idx: has ETag "{new}" at byte \d+, expected "{old}" as at its beginning'
    ):
        stream.document_starts(total - 1000, total)


def test_training_reads_from_the_bucket(both: tuple[str, str], illada, tiny_run, tmp_path: Path) -> None:
    """`illada train` has the same losses from the bucket as from the disk."""
    losses = []
    for number, path in enumerate(both):
        jsonl = tmp_path / f"{number}.jsonl"
        fields = (f"data.train_paths=[{path}]", "model.vocab_size=1000", f"logging.jsonl_path={jsonl}")
        outcome = illada("train", *tiny_run, *fields, "data.validation_paths=[]", "data.loader_threads=4")
        assert outcome.code == 0, outcome.err
        losses.append([json.loads(line)["loss"] for line in jsonl.read_text().splitlines()])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3

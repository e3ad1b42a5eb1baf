"""Corpora of very many shards: what a process holds does not grow with what it has read."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, write_manifest
from illada_megatron.data.shards.shard_list import KnownShards, Shard, list_shards

# Reads windows in the corpus's own random order from four threads, and the documents' boundaries of some. Prints what
# the process holds before, and after each tenth.
READER = """
import json, os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
manifest, windows, length, descriptors, every = sys.argv[1], *map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from illada_megatron.data.corpus.corpus import Corpus
def held():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {name: int(status[name].split()[0]) for name in ("VmRSS", "RssFile", "VmPTE")}
    maps, files = len(Path("/proc/self/maps").read_text().splitlines()), len(os.listdir("/proc/self/fd"))
    return {**kilobytes, "maps": maps, "files": files}
corpus = Corpus([manifest], length, seed=5, shuffle=True, vocab_size=155_136)
def read(indices):
    batch, documents = np.empty((8, length), np.int64), 0
    for first in range(indices.start, indices.stop, 8):
        corpus.read(range(first, first + 8), batch)
        assert not batch.any()
        if first % every == 0:
            documents += len(corpus.document_starts(first))
    return documents
stages, documents = [held()], 0
with ThreadPoolExecutor(4) as pool:
    for tenth in range(10):
        share = windows // 40
        parts = [range(part * share, (part + 1) * share) for part in range(4 * tenth, 4 * tenth + 4)]
        documents += sum(pool.map(read, parts))
        stages.append(held())
print(json.dumps({"stages": stages, "documents": documents, "windows": corpus.num_windows}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied at the end: whoever copies the temporary directory would write the holes out."""
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


def write_sparse_corpus(folder: Path, shards: int, tokens: int, document_tokens: int) -> Path:
    """A manifest of `shards` int32 shards of `tokens` tokens each, of which the disk holds nothing but the names; they
    share one index."""
    documents = tokens // document_tokens
    with IndexedDatasetWriter(folder / "few", 155_136) as writer:
        writer.add(np.zeros(documents, np.int32), np.ones(documents, np.int64))
    content = bytearray((folder / "few.idx").read_bytes())
    lengths = np.full(documents, document_tokens, "<i4")
    lengths[-1] += tokens - int(lengths.sum())
    pointers = np.arange(documents, dtype="<i8") * (4 * document_tokens)
    content[34 : 34 + 12 * documents] = lengths.tobytes() + pointers.tobytes()
    (folder / "few.idx").write_bytes(content)
    entries = []
    for number in range(shards):
        prefix = folder / f"shard_{number:06d}"
        os.symlink("few.idx", f"{prefix}.idx")  # noqa: PTH211
        with Path(f"{prefix}.bin").open("wb") as stream:
            stream.truncate(4 * tokens)
        entries.append(ShardEntry(path=prefix.name, dtype="int32", tokens=tokens, documents=documents))
    write_manifest(Manifest(vocab_size=155_136, shards=tuple(entries)), folder / "all.manifest.json")
    return folder / "all.manifest.json"


def read_windows(manifest: Path, windows: int, length: int, descriptors: int, every: int) -> dict:
    arguments = [sys.executable, "-c", READER, str(manifest), *map(str, (windows, length, descriptors, every))]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def require_flat(stages: list[dict[str, int]], descriptors: int) -> None:
    """Page tables and memory (kB), maps and files after the first tenth as after the last; the first maps threads'
    stacks and imports."""
    first, *_, last = stages[1:]
    assert last["files"] <= stages[0]["files"] + 2 * (descriptors // 4) + 4  # .bin and .idx
    assert last["maps"] <= first["maps"] + 20, stages
    assert last["VmPTE"] <= first["VmPTE"] + 200, stages
    assert last["RssFile"] <= first["RssFile"] + 2000, stages
    assert last["VmRSS"] <= first["VmRSS"] + 20_000, stages


def test_a_process_holds_no_more_after_more_windows(folder: Path) -> None:
    """3,000 shards of 512 MB with few descriptors: a map, or an open file, for each would show."""
    manifest = write_sparse_corpus(folder, 3000, 128_000_000, 4000)
    outcome = read_windows(manifest, 16_000, 512, descriptors=128, every=80)
    require_flat(outcome["stages"], 128)
    assert outcome["documents"] > 0


@pytest.mark.slow
def test_12_trillion_tokens_in_94_000_shards(folder: Path) -> None:
    """More shards than a process may map (vm.max_map_count), a million random windows."""
    manifest = write_sparse_corpus(folder, 94_000, 128_000_000, 1000)
    outcome = read_windows(manifest, 1_000_000, 1024, descriptors=1024, every=800)
    print(json.dumps(outcome))
    require_flat(outcome["stages"], 1024)
    assert outcome["windows"] * 1024 > 12.0e12
    assert outcome["documents"] > 0


def test_opening_by_manifest_looks_for_no_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system each look costs, on a thousand ranks at once. Listing, comparing with validation shards
    and with each other: as many calls for 3,000 shards as for 30."""
    write_sparse_corpus(folder, 1, 1000, 10)
    calls: list[str] = []
    for name in ("stat", "lstat", "readlink", "open", "scandir", "listdir", "access"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, name=name, **k: calls.append(f"{name} {a}") or real(*a, **k)
        )
    counts = []
    for shards in (30, 3000):
        # no two of a length, as of real text, or all of one length, and told apart by checksums
        for lengths, checksums in ((range(1000, 1000 + 2 * shards), False), ([1000] * 2 * shards, True)):
            entries = [
                ShardEntry(
                    path=f"part_{number % 3}/shard_{number}",
                    dtype="int32",
                    tokens=length,
                    documents=1,
                    bin_xxh3_128=f"{number:032x}" if checksums else None,
                )
                for number, length in enumerate(lengths)
            ]
            for name, some in (("train", entries[:shards]), ("held_out", entries[shards:])):
                write_manifest(Manifest(vocab_size=1000, shards=tuple(some)), folder / f"{name}.json")
            calls.clear()
            training = list_shards([folder / "train.json"]).shards
            known = KnownShards(training)
            assert len(training) == shards
            assert not any(known.find(shard) for shard in list_shards([folder / "held_out.json"]).shards)
            counts.append(len(calls))
    assert len({*counts}) == 1, counts
    assert counts[0] < 100


@pytest.mark.parametrize("field", ["checksum", "prefix"])
def test_comparing_shards_of_equal_size_is_no_search(tmp_path: Path, field: str) -> None:
    """94,000 shards of one size, as fixed-size shards are, were 4.4 thousand million comparisons."""
    compared = []

    class Watched(str):
        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return str(self) == other

        __hash__ = str.__hash__

    known, count = KnownShards(), 500
    for number in range(count):
        text = Watched(f"{tmp_path}/{number}")
        shard = Shard(text, "int32", 1000) if field == "prefix" else Shard(f"/{number}", "int32", 1000, text)
        assert known.find(shard) is None
        known.add(shard)
    assert known.find(shard) is shard
    assert len(compared) <= 4 * count


def test_a_map_that_is_refused_is_asked_for_once(folder: Path) -> None:
    """FUSE with direct I/O, or too many maps: a window would open the file and fail again each time."""
    script = """
import os, resource, sys
import numpy as np
from illada_megatron.data.shards._indexed_dataset import TokenReader
path, tokens = sys.argv[1], 1 << 31
with open(path, "wb") as stream:
    stream.truncate(2 * tokens)
limit = 4096 * int(open("/proc/self/statm").read().split()[0]) + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
reader, out = TokenReader([path], ["uint16"], [tokens]), np.ones((1, 5000), np.int64)
assert reader.mapped
reader.read(np.array([0]), out, 10)
assert path not in open("/proc/self/maps").read() and not out.any()
os.unlink(path)  # what is opened again fails
reader.read(np.array([10**9]), out, 10)
"""
    result = subprocess.run([sys.executable, "-c", script, str(folder / "0.bin")], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_where_descriptors_run_out_those_of_shards_are_closed(folder: Path) -> None:
    """By whatever else the process has opened: windows by pread, through maps and documents' boundaries go on."""
    manifest = write_sparse_corpus(folder, 100, 1000, 10)
    script = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
import numpy as np
from illada_megatron.data.corpus.stream import TokenStream
from illada_megatron.data.shards import document_index
from illada_megatron.data.shards._indexed_dataset import TokenReader
from illada_megatron.data.shards.shard_list import list_shards
shards = list_shards([sys.argv[1]]).shards
small = TokenStream(shards)
holder = TokenReader(["/nowhere"] * 924, ["uint16"] * 924, [1] * 924)
large = TokenStream(shards)
assert small._reader.mapped and not large._reader.mapped
out, hogs = np.empty((1, 100), np.int64), []
def hog():
    try:
        while True:
            hogs.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
def read(stream, shard):
    stream.read(np.array([1000 * shard]), out, 10)
def documents(shard):
    assert len(small.document_starts(1000 * shard, 1000 * shard + 100)) == 9
steps = [lambda n: read(large, n), documents, lambda n: read(small, n)]
for kept in steps[:2]:  # files of shards only, then indexes only
    for number, step in enumerate(steps):
        document_index.close_document_indexes()
        large = TokenStream(shards)
        for shard in range(20):
            kept(shard)
        hog()
        step(50 + number)
        [os.close(one) for one in hogs]
        hogs.clear()
"""
    result = subprocess.run([sys.executable, "-c", script, str(manifest)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")

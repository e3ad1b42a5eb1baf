"""Merging: the same bytes as Megatron's tool makes, and no failure that leaves something a reader would take."""

import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from illada_megatron.data.shards.merge import merge, progress_bytes
from illada_megatron.data.shards.shard_list import find_shards

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets import indexed_dataset as megatron

TOOL = Path(__file__).parents[3] / "tools" / "merge_datasets.py"


def _megatron_shard(prefix: Path, dtype: type, documents: Sequence[Sequence[Sequence[int]]]) -> str:
    """documents: a list of sequences each."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        tokens = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def _names(directory: Path) -> list[str]:
    """Without the locks, which stay."""
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".lock")


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Documents of several sequences, of none, of empty ones; the last shard has one token."""
    folder = tmp_path / "in"
    folder.mkdir()
    return [
        _megatron_shard(folder / "a", np.uint16, [[[1, 2], [3]], [], [[4, 5, 6]]]),
        _megatron_shard(folder / "b", np.uint16, [[], [[7], [], [8, 9]], [[]]]),
        _megatron_shard(folder / "c", np.uint16, [[[10]]]),
    ]


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.int64])
def test_the_same_bytes_as_megatrons_merge(tmp_path: Path, dtype: type) -> None:
    generator = np.random.default_rng(0)
    prefixes = []
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for i in range(4):
        documents = [
            [generator.integers(0, 30_000, generator.integers(0, 5)).tolist() for _ in range(generator.integers(0, 4))]
            for _ in range(50)
        ]
        prefixes.append(_megatron_shard(tmp_path / str(i), dtype, documents))
        builder.add_index(prefixes[-1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    summary = merge(find_shards(prefixes), tmp_path / "ours")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    dataset = IndexedDataset(tmp_path / "ours")
    dataset.verify(vocab_size=30_000)
    assert (summary.documents, summary.tokens) == (200, dataset.num_tokens)


def test_megatron_reads_what_we_merge(three: list[str], tmp_path: Path) -> None:
    merge(find_shards(three), tmp_path / "out")
    dataset = megatron.IndexedDataset(str(tmp_path / "out"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 2], [3], [4, 5, 6], [7], [], [8, 9], [], [10]]
    assert dataset.document_indices.tolist() == [0, 2, 2, 3, 3, 6, 7, 8]


def test_progress_adds_up(three: list[str], tmp_path: Path) -> None:
    reported: list[int] = []
    merge(find_shards(three), tmp_path / "out", reported.append)
    assert sum(reported) == progress_bytes(find_shards(three)) == 20


def test_the_index_is_merged_in_pieces(write_shard, tmp_path: Path) -> None:
    """More documents than are handled at a time, in the first and in the second shard."""
    many = (1 << 20) + 3
    first = write_shard("first", [[1]] * 5)
    second = write_shard("second", [[2]])
    from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter

    with IndexedDatasetWriter(tmp_path / "many", 10) as writer:
        writer.add(np.ones(2 * many, dtype=np.int32), np.full(many, 2))
    merge(find_shards([first, tmp_path / "many", second]), tmp_path / "out")
    dataset = IndexedDataset(tmp_path / "out")
    dataset.verify(10)
    assert dataset.num_documents == many + 6
    assert dataset.document_lengths(0, many + 6).tolist() == [1] * 5 + [2] * many + [1]


def test_different_token_types_are_refused(write_shard, tmp_path: Path) -> None:
    narrow, wide = write_shard("narrow", [[1]], 1000), write_shard("wide", [[1]], 100_000)
    with pytest.raises(DataError, match=r"wide: holds int32 tokens, expected uint16 as in .*narrow: shards of diff"):
        merge(find_shards([narrow, wide]), tmp_path / "out")


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_input_is_named(three: list[str], tmp_path: Path, missing: str) -> None:
    Path(three[1] + missing).unlink()
    with pytest.raises(DataError, match=rf"b\{missing}: no such file"):
        merge(find_shards(three), tmp_path / "out")
    assert _names(tmp_path) == ["in"]


def test_a_damaged_input_is_refused_before_anything_is_written(three: list[str], tmp_path: Path) -> None:
    path = Path(three[1] + ".idx")
    content = bytearray(path.read_bytes())
    content[34 + 4 * 4 + 8] ^= 2  # the second sequence's place
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"b\.idx: places sequence 1 at byte"):
        merge(find_shards(three), tmp_path / "out")
    assert _names(tmp_path) == ["in"]


def test_the_output_must_not_be_an_input(three: list[str], tmp_path: Path) -> None:
    """Nor anything else that is there, by whatever name: a link to it is the same file."""
    before = Path(three[0] + ".bin").read_bytes()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(three[0] + suffix)
    for output in (three[0], f"{Path(three[0]).parent}/../in/a", tmp_path / "link"):
        with pytest.raises(DataError, match="there already"):
            merge(find_shards(three), output)
    assert Path(three[0] + ".bin").read_bytes() == before


def test_an_exception_of_the_progress_callback_ends_the_merge(three: list[str], tmp_path: Path) -> None:
    """At each of its calls; Ctrl-C comes the same way. Nothing is left."""
    calls = 0

    def count(_: int) -> None:
        nonlocal calls
        calls += 1

    merge(find_shards(three), tmp_path / "other", count)
    assert calls >= 9
    for last in range(calls):
        left = last

        def stop(_: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge(find_shards(three), tmp_path / "out", stop)
        assert _names(tmp_path) == ["in", "other.bin", "other.idx"]


HANGING = """
import sys, time
from illada_megatron.data.shards.shard_list import find_shards
from illada_megatron.data.shards.merge import merge
calls = 0
def report(count):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        print("now", flush=True)
        time.sleep(600)
merge(find_shards(sys.argv[3:]), sys.argv[2], report)
"""


@pytest.mark.parametrize("call", [4, 6, 9])
def test_killed_merge_leaves_no_shard_and_the_next_one_removes_what_it_left(
    three: list[str], tmp_path: Path, call: int
) -> None:
    """SIGKILL after the first shard's tokens, the last one's, and within the index."""
    output = tmp_path / "out"
    run = [sys.executable, "-c", HANGING, str(call), str(output), *three]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("out.bin.*.tmp"))
    with pytest.raises(DataError, match="no such file"):
        IndexedDataset(output)
    merge(find_shards(three), output)
    assert IndexedDataset(output).num_tokens == 10
    assert _names(tmp_path) == ["in", "out.bin", "out.idx"]


def test_two_merges_into_one_output_do_not_mix(three: list[str], tmp_path: Path) -> None:
    def second(_: int) -> None:
        with pytest.raises(DataError, match=r"out\.lock: another process is making"):
            merge(find_shards(three), tmp_path / "out")

    merge(find_shards(three), tmp_path / "out", second)
    IndexedDataset(tmp_path / "out").verify()
    assert _names(tmp_path) == ["in", "out.bin", "out.idx"]


SHIM = """
#include <errno.h>
#include <stddef.h>
#include <sys/types.h>
#include <unistd.h>
ssize_t copy_file_range(int from, off_t *a, int to, off_t *b, size_t count, unsigned flags) {
  static int calls = 0;
  (void)a, (void)b, (void)flags;
  if (calls++ % 2 == 1) { errno = FAILURE; return RESULT; }
  /* every other call does a part of it, as the kernel may */
  char buffer[3];
  const ssize_t done = read(from, buffer, count < 3 ? count : 3);
  return done > 0 ? write(to, buffer, done) : done;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("failure", "result"), [("EXDEV", -1), ("ENOSYS", -1), ("EINVAL", -1), ("EINTR", -1), ("0", 0)]
)
def test_where_the_kernel_does_not_copy_it_is_read_and_written(
    three: list[str], tmp_path: Path, failure: str, result: int
) -> None:
    """Other file systems, old kernels, a signal, "0 bytes" of a file that has more: in the middle of a file."""
    (tmp_path / "shim.c").write_text(SHIM)
    build = ["cc", "-shared", "-fPIC", f"-DFAILURE={failure}", f"-DRESULT={result}", "-o", "shim.so", "shim.c"]
    subprocess.run(build, cwd=tmp_path, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so")}
    run = [sys.executable, "-c", HANGING, "0", str(tmp_path / "out"), *three]
    subprocess.run(run, check=True, env=environment)
    dataset = IndexedDataset(tmp_path / "out")
    dataset.verify()
    assert dataset.read(0, 10).tolist() == list(range(1, 11))


def test_disk_error_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit refuses the write as a full disk does."""
    big = _megatron_shard(tmp_path / "big", np.int64, [[list(range(200_000))]])
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n" + HANGING
    )
    run = [sys.executable, "-c", limited, "0", str(tmp_path / "out"), big]
    failed = subprocess.run(run, capture_output=True, text=True)
    assert f"[Errno 27] File too large: '{tmp_path / 'out.bin'}." in failed.stderr
    assert _names(tmp_path) == ["big.bin", "big.idx"]


def _manifest(path: Path, prefixes: Sequence[str], vocab_size: int = 1000) -> Path:
    shards = []
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        name = os.path.relpath(prefix, path.parent)
        shards.append(ShardEntry(path=name, dtype="uint16", tokens=dataset.num_tokens, documents=dataset.num_documents))
    write_manifest(Manifest(vocab_size=vocab_size, tokenizer_sha256="ab", shards=tuple(shards)), path)
    return path


def test_tool_merges_a_folder_and_a_manifest(three: list[str], tmp_path: Path) -> None:
    """Megatron's `--input DIR`; with a manifest the result has one too, and it is verified."""
    from_folder = [sys.executable, TOOL, "--input", Path(three[0]).parent, "--output-prefix", tmp_path / "folder"]
    output = subprocess.run(from_folder, check=True, capture_output=True, text=True).stdout
    assert "3 shards, 7 documents, 10 tokens, 20 bytes" in output
    manifest = _manifest(tmp_path / "corpus.json", three)
    run = [sys.executable, TOOL, "--input", manifest, "--output-prefix", tmp_path / "listed"]
    assert "verified" in subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "folder.idx").read_bytes() == (tmp_path / "listed.idx").read_bytes()
    merged = read_manifest(tmp_path / "listed.manifest.json")
    assert (merged.vocab_size, merged.tokenizer_sha256, len(merged.shards)) == (1000, "ab", 1)
    checksums = IndexedDataset(tmp_path / "listed").verify()
    assert merged.shards[0].model_dump() == {
        **{"path": "listed", "dtype": "uint16", "tokens": 10, "documents": 7},
        **{"bin_xxh3_128": checksums.bin_xxh3_128, "idx_xxh3_128": checksums.idx_xxh3_128},
    }
    assert not (tmp_path / "folder.manifest.json").exists()


def test_the_corpus_that_is_merged_keeps_its_manifest(three: list[str], tmp_path: Path) -> None:
    """The obvious name for the result, of a corpus of several shards: there is no web.bin, but a web.manifest.json."""
    manifest = _manifest(tmp_path / "web.manifest.json", three)
    before = manifest.read_bytes()
    with pytest.raises(DataError, match=r"web\.manifest\.json: there already"):
        merge(find_shards([manifest]), tmp_path / "web")
    assert manifest.read_bytes() == before
    assert _names(tmp_path) == ["in", "web.manifest.json"]


def test_what_is_not_as_its_manifest_says_gets_no_name(three: list[str], tmp_path: Path) -> None:
    """A token outside the vocabulary: found before anything is published, so that the next try is not in its way."""
    wrong = _manifest(tmp_path / "wrong.json", three, vocab_size=9)
    for _ in range(2):
        with pytest.raises(DataError, match=r"/out\.bin: .*9"):
            merge(find_shards([wrong]), tmp_path / "out")
        assert _names(tmp_path) == ["in", "wrong.json"]


def test_tool_says_what_is_wrong(three: list[str], tmp_path: Path) -> None:
    run = [sys.executable, TOOL, "--input", three[0], "--input", three[0], "--output-prefix", tmp_path / "out"]
    failed = subprocess.run(run, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("illada: error: ")
    assert "listed 2 times" in failed.stderr


def test_shards_of_different_tokenizers_are_refused(three: list[str], tmp_path: Path) -> None:
    first = _manifest(tmp_path / "first.json", three[:1])
    second = _manifest(tmp_path / "second.json", three[1:], vocab_size=2000)
    with pytest.raises(DataError, match=r"vocab_size 2000, expected 1000 .* different tokenizers"):
        merge(find_shards([first, second]), tmp_path / "out")


def test_manifests_beside_shards_are_looked_at_where_none_is_named(three: list[str], tmp_path: Path) -> None:
    folder = Path(three[0]).parent
    numbered = _megatron_shard(folder / "b_00001", np.uint16, [[[1]]])
    _manifest(folder / "a.manifest.json", three[:1])
    _manifest(folder / "b.manifest.json", [numbered], vocab_size=2000)
    _manifest(folder / "c.manifest.json", three[:1], vocab_size=3000)  # lists another shard
    for paths in ([folder], [three[0], numbered]):
        with pytest.raises(DataError, match=r"b_00001: .* vocab_size 2000, expected 1000 .* different tokenizers"):
            merge(find_shards(paths), tmp_path / "out")
    assert merge(find_shards(three), tmp_path / "out").documents == 7


def test_find_shards_takes_folders_globs_and_manifests(three: list[str], tmp_path: Path) -> None:
    folder = Path(three[0]).parent
    (folder / "left-over.bin.tmp").touch()
    (folder / "notes.txt").touch()
    assert [shard.prefix for shard in find_shards([folder])] == three
    assert [shard.prefix for shard in find_shards([f"{folder}/[bc]", three[0]])] == [three[1], three[2], three[0]]
    listed = find_shards([_manifest(tmp_path / "corpus.json", three[::-1])])
    assert [shard.prefix for shard in listed] == three[::-1]
    assert [shard.entry and shard.entry.tokens for shard in listed] == [1, 3, 6]
    (tmp_path / "empty").mkdir()
    for paths, message in [
        ([], "no shards were given"),
        ([tmp_path / "empty"], "no shard is in this folder"),
        ([tmp_path / "none.json"], "no such manifest"),
        ([three[0], f"{folder}/../in/a"], "listed 2 times"),
        ([three[0], three[0]], "listed 2 times, expected once"),  # one object, as YAML's anchors give
    ]:
        with pytest.raises(DataError, match=message):
            find_shards(paths)

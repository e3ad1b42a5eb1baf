"""The C++ writer: what it refuses, and that no failure leaves something a reader would take for a shard."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from illada_megatron.system.whole_file import TEMPORARY


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _write_and_fail(prefix: Path) -> None:
    with IndexedDatasetWriter(prefix, 10) as writer:
        writer.add(np.array([4]), [1])
        assert any(re.fullmatch(rf"{prefix.name}\.bin{TEMPORARY}", name) for name in _names(prefix.parent))
        raise ZeroDivisionError


@pytest.mark.parametrize(("bad", "position"), [(-1, 0), (100, 3), (70_000, 5), (-(2**31), 5)])
def test_id_outside_the_vocabulary_is_refused_with_its_place(tmp_path: Path, bad: int, position: int) -> None:
    """70000 and -1 would otherwise wrap into valid uint16 ids. The batch leaves no trace; the writer goes on."""
    tokens = np.arange(6)
    tokens[position] = bad
    document = [2, 3, 4][[position < 2, position < 4, True].index(True)]
    with IndexedDatasetWriter(tmp_path / "shard", 100) as writer:
        writer.add(np.array([9, 9]), [1, 1])
        with pytest.raises(
            DataError,
            match=rf"shard: token id {bad} at token offset {2 + position} \(document {document}\) .* size 100",
        ):
            writer.add(tokens, [2, 2, 2])
        writer.add(np.array([8]), [1])
    assert IndexedDataset(tmp_path / "shard").read(0, 3).tolist() == [9, 9, 8]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([2], "add up to 2 but 3"), ([2, 2], "add up to 4 but 3"), ([4, -1], "has length -1"), ([], "add up to 0 but 3")],
)
def test_lengths_that_do_not_fit_the_tokens_are_refused(tmp_path: Path, lengths: list[int], message: str) -> None:
    with IndexedDatasetWriter(tmp_path / "shard", 10) as writer:
        with pytest.raises(DataError, match=message):
            writer.add(np.array([1, 2, 3]), np.array(lengths, dtype=np.int64))
        writer.add(np.array([1, 2, 3]), [3])
    assert IndexedDataset(tmp_path / "shard").num_documents == 1


@pytest.mark.parametrize("tokens", [np.array([1.5, 2.0]), np.array([True, False]), np.array([[1, 2]])])
def test_arrays_that_are_no_token_ids_are_refused(tmp_path: Path, tokens: np.ndarray) -> None:
    """1.5 must not become token 1."""
    with IndexedDatasetWriter(tmp_path / "shard", 10) as writer:
        with pytest.raises(TypeError):
            writer.add(tokens, [2])
        with pytest.raises(TypeError):
            writer.add(np.array([1, 2]), np.array([2.0]))
        writer.add(np.array([1]), [1])


def test_a_view_with_strides_is_written_as_it_reads(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "shard", 100) as writer:
        writer.add(np.arange(20)[::-3], [7])
    assert IndexedDataset(tmp_path / "shard").document(0).tolist() == [19, 16, 13, 10, 7, 4, 1]


@pytest.mark.parametrize("vocab_size", [0, -5, 2**31 + 1])
def test_impossible_vocabulary_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(DataError, match=f"vocab_size is {vocab_size}"):
        IndexedDatasetWriter(tmp_path / "shard", vocab_size)
    assert _names(tmp_path) == []


def test_shard_without_tokens_is_an_error_and_no_file(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "shard", 10)
    writer.add(np.array([], dtype=np.int32), [0, 0])
    with pytest.raises(DataError, match="no tokens were added"):
        writer.finish()
    assert _names(tmp_path) == []


def test_exception_in_the_block_removes_everything(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _write_and_fail(tmp_path / "shard")
    assert _names(tmp_path) == []


def test_forgotten_writer_removes_its_file(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "shard", 10)
    writer.add(np.array([1]), [1])
    del writer
    assert _names(tmp_path) == []


def test_finished_writer_takes_no_more(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "shard", 10) as writer:
        writer.add(np.array([1]), [1])
    for action in (lambda: writer.add(np.array([1]), [1]), writer.finish):
        with pytest.raises(DataError, match="already finished"):
            action()
    writer.abort()
    assert IndexedDataset(tmp_path / "shard").num_tokens == 1


def test_a_shard_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    """Neither by a writer that fails nor by one that does not; written again alike, it is the one that is there."""
    with IndexedDatasetWriter(tmp_path / "shard", 10) as writer:
        writer.add(np.array([1, 2, 3]), [3])
    with pytest.raises(ZeroDivisionError):
        _write_and_fail(tmp_path / "shard")
    for tokens, refusal in (([5, 6], r"shard\.bin: there already \(6 bytes\).*\(4 bytes\)"), ([1, 2, 3], None)):
        before = {path: path.stat().st_ino for path in tmp_path.iterdir()}
        writer = IndexedDatasetWriter(tmp_path / "shard", 10)
        writer.add(np.array(tokens), [len(tokens)])
        with pytest.raises(DataError, match=refusal) if refusal else nullcontext():
            writer.finish()
        assert {path: path.stat().st_ino for path in tmp_path.iterdir()} == before
    assert IndexedDataset(tmp_path / "shard").read(0, 3).tolist() == [1, 2, 3]
    assert _names(tmp_path) == ["shard.bin", "shard.idx"]


def test_two_writers_of_a_shard_never_mix(tmp_path: Path) -> None:
    """Two jobs given the same shard by mistake, with locks or without: the first to finish wins, the other is told."""
    late = IndexedDatasetWriter(tmp_path / "shard", 10)
    late.add(np.array([3, 4, 5]), [3])
    with IndexedDatasetWriter(tmp_path / "shard", 10) as writer:
        writer.add(np.array([1, 2]), [2])
    with pytest.raises(DataError, match=r"shard\.bin: there already"):
        late.finish()
    dataset = IndexedDataset(tmp_path / "shard")
    dataset.verify(10)
    assert dataset.read(0, 2).tolist() == [1, 2]
    assert _names(tmp_path) == ["shard.bin", "shard.idx"]


def test_a_shard_that_is_not_as_long_as_what_was_written_is_not_published(tmp_path: Path) -> None:
    """Another process has written to the file, or the file system has lost a write: fsync says nothing of either."""
    writer = IndexedDatasetWriter(tmp_path / "shard", 10)
    writer.add(np.array([1, 2, 3]), [3])
    (path,) = tmp_path.iterdir()
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=r"\.tmp: has 1000 bytes on the disk, expected the 6 that were written"):
        writer.finish()
    assert _names(tmp_path) == []


def test_names_are_given_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT and some network file systems answer."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with IndexedDatasetWriter(tmp_path / "shard", 10) as writer:
        writer.add(np.array([1, 2]), [2])
    with pytest.raises(DataError, match="there already"), IndexedDatasetWriter(tmp_path / "shard", 10) as writer:
        writer.add(np.array([3]), [1])
    assert IndexedDataset(tmp_path / "shard").read(0, 2).tolist() == [1, 2]
    assert _names(tmp_path) == ["shard.bin", "shard.idx"]


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        IndexedDatasetWriter(tmp_path / "nowhere" / "shard", 10)
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/nowhere/shard\.bin{TEMPORARY}", error.value.filename)


def test_threads_can_share_a_writer(tmp_path: Path) -> None:
    """The GIL is released inside add(): without a lock of its own, blocks of two threads would mix."""
    with IndexedDatasetWriter(tmp_path / "shard", 10) as writer:

        def add(value: int) -> None:
            for _ in range(50):
                writer.add(np.full(20_000, value), [20_000])

        threads = [threading.Thread(target=add, args=(value,)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    dataset = IndexedDataset(tmp_path / "shard")
    documents = [np.unique(dataset.document(i)).tolist() for i in range(dataset.num_documents)]
    assert sorted(documents) == [[value] for value in range(4) for _ in range(50)]


def test_forked_child_does_not_remove_its_parents_file(tmp_path: Path) -> None:
    """multiprocessing on Linux forks; the child drops its copy of the writer when it ends."""
    writer = IndexedDatasetWriter(tmp_path / "shard", 10)
    writer.add(np.array([1, 2]), [2])
    child = os.fork()
    if child == 0:
        del writer
        os._exit(0)
    os.waitpid(child, 0)
    writer.finish()
    assert IndexedDataset(tmp_path / "shard").num_tokens == 2


FULL_DISK = """
import resource, signal, sys
import numpy as np
from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with IndexedDatasetWriter(sys.argv[1], 10) as writer:
        for _ in range(64):
            writer.add(np.ones(100_000, dtype=np.int32), [100_000])
except OSError as error:
    print(error)
"""


def test_disk_error_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit refuses the write as a full disk does."""
    run = [sys.executable, "-c", FULL_DISK, str(tmp_path / "shard")]
    output = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    path = re.escape(str(tmp_path / "shard.bin"))
    assert re.fullmatch(rf"\[Errno 27\] File too large: '{path}{TEMPORARY}'\n", output)
    assert _names(tmp_path) == []


ENDLESS = """
import sys
import numpy as np
from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter
with IndexedDatasetWriter(sys.argv[1], 10) as writer:
    while writer.num_tokens < 1_000_000_000:
        writer.add(np.ones(100_000, dtype=np.int32), [100_000])
        print(writer.num_tokens, flush=True)
"""


def test_killed_writer_leaves_no_shard_and_the_next_one_succeeds(tmp_path: Path) -> None:
    """SIGKILL in the middle: neither name is given, and the left-over file is in nobody's way."""
    run = [sys.executable, "-c", ENDLESS, str(tmp_path / "shard")]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 10_000_000:
            pass
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (left_over,) = tmp_path.iterdir()
    assert re.fullmatch(rf"shard\.bin{TEMPORARY}", left_over.name)
    assert left_over.stat().st_size > 0
    with pytest.raises(DataError, match="no such file"):
        IndexedDataset(tmp_path / "shard")
    with IndexedDatasetWriter(tmp_path / "shard", 10) as writer:
        writer.add(np.array([1, 2]), [2])
    assert IndexedDataset(tmp_path / "shard").num_tokens == 2
    assert _names(tmp_path) == ["shard.bin", left_over.name, "shard.idx"]


PUBLISH = """
import sys
import numpy as np
from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter
with IndexedDatasetWriter(sys.argv[1], 10) as writer:
    writer.add(np.ones(1000, dtype=np.int32), [1000])
"""


def _can_trace() -> bool:
    """strace is there, and the container lets it trace."""
    return (
        shutil.which("strace") is not None and subprocess.run(["strace", "-qqo", "/dev/null", "true"]).returncode == 0
    )


@pytest.mark.skipif(not _can_trace(), reason="needs strace")
def test_system_calls_come_in_the_order_that_a_power_failure_needs(tmp_path: Path) -> None:
    """Both files flushed; .bin named before .idx; the directory flushed after each; nothing renamed over, and only
    temporary names removed."""
    trace = tmp_path / "trace"
    calls = ["strace", "-f", "-o", str(trace), "-e", "trace=/^(fsync|rename|unlink|link)"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    run = [*calls, sys.executable, "-c", PUBLISH, str(tmp_path / "shard")]
    subprocess.run(run, check=True, env=environment)
    lines = trace.read_text().splitlines()
    found = [re.search(r"^\d+ +(fsync|rename|unlink|link)\w*\((?:.*/shard([^\"]*)\")?", line) for line in lines]
    steps = [(call[1], re.sub(TEMPORARY, " temporary", call[2] or "")) for call in found if call]
    assert [step for step in steps if step[0] != "unlink"] == [
        *[("fsync", ""), ("fsync", "")],
        *[("link", ".bin"), ("fsync", "")],
        *[("link", ".idx"), ("fsync", "")],
    ]
    assert {step[1] for step in steps if step[0] == "unlink"} == {".bin temporary", ".idx temporary"}
    assert IndexedDataset(tmp_path / "shard").num_tokens == 1000

"""The harness itself: what it sees, that each fault strikes where it was told to, and what a power loss leaves."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from faults.injection import WRITING, Fault, Injection
from faults.power_loss import Disk, read_tree, replayed, write_tree
from launch import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux is stood before")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def faults(place: Path, tmp_path: Path) -> Injection:
    return Injection(tmp_path / "shared", place, journal="contents")


@pytest.fixture
def start(faults: Injection, place: Path) -> Start:
    """start(program, rank=None): Python in the root, with `os`, `Path`."""

    def run(program: str, rank: int | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **faults.environment}
        environment |= {} if rank is None else {"RANK": str(rank)}
        command = [sys.executable, "-c", f"import os, mmap, shutil\nfrom pathlib import Path\n{program}"]
        return subprocess.Popen(command, cwd=place, env=environment, stdout=-1, stderr=-1, text=True)

    return run


def _said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip()


TRY_TO_WRITE = """
for name in ("a", "b", "c"):
    try:
        Path(name).write_bytes(b"12345")
        print(name)
    except OSError as error:
        print(name, error.errno)
"""


def test_nth_call_fails(faults: Injection, start: Start) -> None:
    faults.arm(Fault("write", nth=2, error=errno.ENOSPC))
    assert _said(start(TRY_TO_WRITE)) == f"a\nb {errno.ENOSPC}\nc"
    assert faults.fired() == 1
    faults.arm(Fault("open", nth=2, times=None, error=errno.EINVAL))
    assert _said(start(TRY_TO_WRITE)) == f"a\nb {errno.EINVAL}\nc {errno.EINVAL}"
    assert faults.fired() == 2
    faults.arm(Fault("open write", "?", error=errno.EIO))
    assert _said(start(TRY_TO_WRITE)) == f"a {errno.EIO}\nb\nc"
    faults.arm(Fault(path="b", error=errno.EIO))
    assert _said(start(TRY_TO_WRITE)) == f"a\nb {errno.EIO}\nc"
    faults.arm()
    assert _said(start(TRY_TO_WRITE)) == "a\nb\nc"


def test_only_the_chosen_rank_and_once_over_restarts(faults: Injection, start: Start) -> None:
    faults.arm(Fault("write", rank=1))
    assert _said(start(TRY_TO_WRITE, rank=0)) == "a\nb\nc"
    assert _said(start(TRY_TO_WRITE, rank=1)) == f"a {errno.EIO}\nb\nc"
    assert _said(start(TRY_TO_WRITE, rank=1)) == "a\nb\nc"


def test_answer_lost(faults: Injection, start: Start, place: Path) -> None:
    """A rename that was done says that it was not."""
    (place / "old").write_text("x")
    faults.arm(Fault("rename", "new", "fail_after", error=errno.ETIMEDOUT))
    program = "try: os.replace('old', 'new')\nexcept OSError as error: print(error.errno)"
    assert _said(start(program)) == str(errno.ETIMEDOUT)
    assert [path.name for path in place.iterdir()] == ["new"]


def test_short_reads_and_writes(faults: Injection, start: Start, place: Path) -> None:
    faults.arm(Fault("write", action="short", argument=2))
    assert _said(start("f = os.open('a', os.O_RDWR | os.O_CREAT); print(os.write(f, b'12345'))")) == "2"
    (place / "a").write_bytes(b"12345")
    for call in ("os.read(f, 5)", "os.pread(f, 5, 0)", "os.preadv(f, [b := bytearray(5)], 0) and bytes(b)[:3]"):
        faults.arm(Fault("read pread", action="short", argument=3))
        assert _said(start(f"f = os.open('a', os.O_RDONLY); print({call})")) == "b'123'"
    faults.arm(Fault("read pread", action="short", argument=0))  # a file that ends too early
    assert _said(start("f = os.open('a', os.O_RDONLY); print(os.pread(f, 5, 0))")) == "b''"


def test_slow_call(faults: Injection, start: Start) -> None:
    faults.arm(Fault("fsync", action="delay", argument=300))
    program = "import time; f = os.open('.', 0); begin = time.time(); os.fsync(f); print(time.time() - begin)"
    assert float(_said(start(program))) >= 0.3


def test_hang_until_told(faults: Injection, start: Start) -> None:
    """It goes on with what is armed then: a test can look at the files, choose the next fault and let it go."""
    faults.arm(Fault("open", "b", "hang"))
    process = start(TRY_TO_WRITE)
    assert faults.wait_until_fired(lambda: process.poll() is None)
    time.sleep(0.1)
    assert process.poll() is None
    faults.arm(Fault("open", "b", error=errno.EIO))
    assert _said(process) == f"a\nb {errno.EIO}\nc"


def test_frozen_file_system(faults: Injection, start: Start, place: Path) -> None:
    faults.arm(Fault("open", "b", "freeze"))
    first = start(TRY_TO_WRITE)
    assert faults.wait_until_fired(lambda: first.poll() is None)
    second = start("print(os.path.exists('a'))")
    while not any(call.pid == second.pid and call.injected for call in faults.journal()):
        assert second.poll() is None
        time.sleep(0.01)
    assert first.poll() is None
    faults.arm()
    assert _said(first) == "a\nb\nc"
    assert _said(second) == "True"


def test_kill_and_stop(faults: Injection, start: Start, place: Path) -> None:
    faults.arm(Fault("write", "b", "kill"))
    process = start(TRY_TO_WRITE)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert read_tree(place) == {"a": b"12345", "b": b""}
    faults.arm(Fault("write", "b", "stop"))
    process = start(TRY_TO_WRITE)
    assert faults.wait_until_fired(lambda: process.poll() is None)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    process.send_signal(signal.SIGCONT)
    assert _said(process) == "a\nb\nc"


# What the package does with files: shards, their merge, records, manifests, folders of checkpoints, new directories.
EVERYTHING = """
import numpy as np, torch
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.new_directory import staged
from illada_megatron.checkpoint.files.tensors import TensorReader, TensorWriter, write_metadata
from illada_megatron.data.preprocessing.records import Counts, write_record
from illada_megatron.data.shards.indexed_dataset import IndexedDataset, IndexedDatasetWriter, publish_shard
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, file_checksum, write_manifest
from illada_megatron.data.shards._indexed_dataset import merge_shards
for name in ("one", "two"):
    with IndexedDatasetWriter(Path(name), 250) as writer:
        writer.add(np.arange(20), [10, 10])
merge_shards(["one", "two"], "both", ".tmp")
publish_shard("both", ".tmp")
IndexedDataset(Path("both")).num_documents
file_checksum("both.bin")
write_record(Path("both.done.json"), Counts())
entry = ShardEntry(path="both", dtype="uint16", tokens=40, documents=4)
write_manifest(Manifest(vocab_size=250, shards=(entry,)), "both.manifest.json")
folder = LocalFolder(Path.cwd() / "step_00000001")
folder.make()
writer = TensorWriter(folder, 0)
writer.write("tensor", torch.arange(5000.0))
write_metadata(folder, [writer.close()])
folder.replace("record", b"content")
TensorReader(folder).read("tensor", (5,), (100,))
with staged(Path("new").absolute(), 10) as directory:
    (directory / "file").write_bytes(b"12")
torch.save({"a": torch.ones(3)}, "new/torch.pt")
Path("new/array.npy").write_bytes(np.lib.format.magic(1, 0) + bytes(100))
np.memmap("new/array.npy", np.uint8, "r")
folder.clear()
Path("both.idx").unlink()
"""
# strace's names for those of the journal; what is not here changes nothing and reads nothing
_SAME = {"openat": "open", "creat": "open", "pwrite64": "write", "writev": "write", "pwritev": "write"}
_SAME |= {"fdatasync": "fsync", "ftruncate": "truncate", "unlinkat": "unlink", "renameat2": "rename"}
_SAME |= {"renameat": "rename", "mkdirat": "mkdir", "pread64": "pread", "preadv": "pread", "readv": "read"}


def test_journal_has_what_strace_has(faults: Injection, place: Path, tmp_path: Path) -> None:
    """Calls that went past the interposer would never be tried."""
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("needs strace, and leave to trace")
    program = [sys.executable, "-c", f"from pathlib import Path\n{EVERYTHING}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(program, cwd=place, env={**environment, **faults.environment}, check=True)
    traced = tmp_path / "traced"
    traced.mkdir()
    trace = tmp_path / "trace"
    options = ["-f", "-y", "-o", str(trace), "-e", "trace=file,desc"]
    subprocess.run([strace, *options, *program], cwd=traced, env=environment, check=True)
    found = Counter(
        ("open" if call.name == "opendir" else "unlink" if call.name == "rmdir" else call.name, _plain(call.path))
        for call in faults.journal()
    )
    expected = Counter(_traced(trace.read_text(), traced))
    names = {*WRITING, "open", "read", "pread", "flock", "unlink"} - {"rmdir"}
    only_strace = {key: count - found[key] for key, count in expected.items() if key[0] in names and count > found[key]}
    # libraries that the dynamic loader looks for in the working directory, as torch's CUDA build makes it do
    only_strace = {(name, path): n for (name, path), n in only_strace.items() if not re.search(r"\.so(\.\d+)*$", path)}
    assert not only_strace, only_strace
    assert sum(count for key, count in found.items() if key[0] in WRITING) > 50


def _plain(path: str) -> str:
    """Without what is drawn at random."""
    return re.sub(r"(?<=\.)(?=.*\d|.*_)([0-9a-z_]{8}|[0-9a-f]{16})(?=$|\.)", "*", path)


def _traced(text: str, root: Path) -> list[tuple[str, str]]:
    found = []
    for line in text.splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)", line)
        if match is None:
            continue
        name, rest = match.groups()
        name = _SAME.get(name, "unlink" if name == "rmdir" else name)
        cut = re.escape(str(root))
        if name in ("open", "mkdir", "unlink", "rename", "truncate") and '"' in rest:
            inner = re.match(rf'(?:(?:AT_FDCWD|\d+)<({cut}[^>]*)>, )?"([^"]*)"', rest)
            if inner is None:
                continue
            path = os.path.normpath(os.path.join(inner.group(1) or root, inner.group(2)))  # noqa: PTH118
        else:
            where = r"\d+<[^>]*>, (?:NULL|\[\d+\]), " if name == "copy_file_range" else ""  # the second is written to
            inner = re.match(rf"{where}\d+<({cut}[^>]*)>", rest)
            if inner is None:
                continue
            path = inner.group(1)
        if path == str(root) or path.startswith(f"{root}/"):
            found.append((name, _plain(os.path.relpath(path, root))))
    return found


WRITE_SAFELY = """
with open("kept.tmp", "wb") as file:
    file.write(b"new")
    file.flush()
    os.fsync(file.fileno())
os.replace("kept.tmp", "kept")
directory = os.open(".", os.O_RDONLY)
os.fsync(directory)
"""


def test_power_loss_spares_what_was_made_durable(faults: Injection, start: Start, place: Path) -> None:
    (place / "kept").write_bytes(b"old")
    disk = Disk.of(place)
    _said(start(WRITE_SAFELY))
    journal = faults.journal()
    found = [{tree.get("kept") for _, tree in disk.power_losses()} for _, disk in replayed(disk, journal)]
    assert found[0] == {b"old"}
    assert {b"old", b"new"} in found  # renamed, and the directory not flushed
    assert found[-1] == {b"new"}
    assert all(one <= {b"old", b"new"} for one in found)


@pytest.mark.parametrize(
    ("without", "broken"),
    [("    os.fsync(file.fileno())", {b"", b"\0\0\0"}), ("os.fsync(directory)", {b"old"})],
)
def test_power_loss_finds_a_missing_fsync(
    faults: Injection, start: Start, place: Path, without: str, broken: set[bytes]
) -> None:
    """The fault that this is for: it has to be found where it is."""
    (place / "kept").write_bytes(b"old")
    disk = Disk.of(place)
    _said(start(WRITE_SAFELY.replace(without, "")))
    *_, (_, last) = replayed(disk, faults.journal())
    assert broken <= {tree.get("kept") for _, tree in last.power_losses()}


def test_replayed_to_the_end_is_what_is_there(faults: Injection, place: Path, tmp_path: Path) -> None:
    """All kinds of calls: the journal's contents are those of the disk."""
    disk = Disk.of(place)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **faults.environment}
    subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path\n{EVERYTHING}"], cwd=place, env=environment, check=True
    )
    *_, (_, last) = replayed(disk, faults.journal())
    assert last.kill() == read_tree(place)
    write_tree(last.kill(), tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == last.kill()

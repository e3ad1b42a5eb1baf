"""Windows of the concatenated shards, read by C++ into the caller's buffer."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards._indexed_dataset import TokenReader, check_token_ids

DTYPES = ["uint16", "int16", "int32", "int64"]
LENGTHS = [700, 1, 3, 1500]
MOST_MAPS = 1024


@pytest.fixture(autouse=True, params=["mapped", "by pread"])
def mapped(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Every test twice: as a corpus that fits what a process may map is read, and as a larger one is."""
    if request.param == "mapped":
        yield True
        return
    if not (holder := _holder_of_maps()).mapped:
        gc.collect()  # readers of earlier tests, in the tracebacks of their errors
        holder = _holder_of_maps()
    assert holder.mapped
    yield False
    del holder


def _holder_of_maps() -> TokenReader:
    """Nothing of it is opened; while it lives, no other reader of the process gets maps."""
    return TokenReader(["/nowhere"] * MOST_MAPS, ["uint16"] * MOST_MAPS, [1] * MOST_MAPS)


def write_bins(directory: Path, dtypes: Sequence[str] = DTYPES) -> tuple[TokenReader, np.ndarray, list[Path]]:
    """A reader of one shard of each type, the whole stream, and the paths."""
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 30_000, length) for length in LENGTHS]
    paths = [directory / f"{i}.bin" for i in range(len(dtypes))]
    for path, part, dtype in zip(paths, parts, dtypes, strict=True):
        part.astype(dtype).tofile(path)
    return TokenReader(list(map(str, paths)), list(dtypes), LENGTHS), np.concatenate(parts), paths


@pytest.mark.parametrize("out_dtype", [np.int64, np.int32, np.uint16])
@pytest.mark.parametrize("length", [1, 5, 64, 1000, 2204])
def test_windows_cross_shards_of_all_types(tmp_path: Path, mapped: bool, out_dtype: type, length: int) -> None:
    """Each place a window can begin at; sizes around the vector loops' widths are among them."""
    reader, stream, _ = write_bins(tmp_path)
    assert (reader.num_tokens, reader.num_shards, reader.mapped) == (2204, 4, mapped)
    starts = np.arange(len(stream) - length + 1)
    out = np.full((len(starts), length), 7, dtype=out_dtype)
    reader.read(starts, out, 30_000)
    assert np.array_equal(out, np.lib.stride_tricks.sliding_window_view(stream, length))


def test_nothing_is_opened_before_it_is_touched(tmp_path: Path) -> None:
    """Thousands of shards are announced at once; one that is missing is an error when its tokens are needed."""
    reader, stream, paths = write_bins(tmp_path)
    paths[3].unlink()
    out = np.empty((1, 704), dtype=np.int64)
    reader.read(np.array([0]), out, 30_000)
    assert np.array_equal(out[0], stream[:704])
    with pytest.raises(DataError, match=r"3\.bin: no such file"):
        reader.read(np.array([1]), out, 30_000)
    many = 50_000
    reader = TokenReader([f"/nowhere/shard_{i:05}.bin" for i in range(many)], ["uint16"] * many, [2**40] * many)
    assert reader.num_tokens == many * 2**40
    with pytest.raises(DataError, match=r"/nowhere/shard_43210\.bin: no such file"):
        reader.read(np.array([43210 * 2**40 + 5]), out, 30_000)


@pytest.mark.parametrize("change", [-2, 1, 2])
def test_bin_of_another_size_is_refused_at_the_first_touch(tmp_path: Path, change: int) -> None:
    reader, _, paths = write_bins(tmp_path)
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    message = rf"0\.bin: is {1400 + change} bytes long, expected 1400 bytes for the 700 uint16 tokens"
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            reader.read(np.array([0]), np.empty((1, 5), dtype=np.int64), 30_000)


@pytest.mark.parametrize("shard", range(4))
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("out_dtype", [np.int64, np.int32, np.uint16])
def test_bad_id_is_named_with_its_place(tmp_path: Path, shard: int, at: int, out_dtype: type) -> None:
    """In the first, middle and last token of a shard; negative where the type can be."""
    reader, _, paths = write_bins(tmp_path)
    offset = [0, LENGTHS[shard] // 2, LENGTHS[shard] - 1][at]
    tokens = np.fromfile(paths[shard], dtype=DTYPES[shard])
    for bad in (30_000, 32_767, -1, -(2**15)) if shard else (30_000, 65_535):
        tokens[offset] = bad
        tokens.tofile(paths[shard])
        with pytest.raises(DataError) as error:
            reader.read(np.array([0, 0]), np.empty((2, 2204), dtype=out_dtype), 30_000)
        assert str(error.value) == (
            f"{paths[shard]}: token id {bad} at token offset {offset} is not in the vocabulary of size 30000: the "
            "shard was written with another tokenizer; set model.vocab_size to that tokenizer's size or preprocess "
            "the text again"
        )


@pytest.mark.parametrize(
    ("stored", "out_dtype", "vocab_size"),
    [
        *(("int16", out, vocab_size) for out in (np.int32, np.int64) for vocab_size in (65_536, 65_537, 155_136)),
        ("int16", np.uint16, 65_536),
        ("int32", np.int64, 2**32),
        ("int32", np.int64, 2**40),
    ],
)
def test_no_negative_id_passes_for_a_large_vocabulary(
    tmp_path: Path, stored: str, out_dtype: type, vocab_size: int
) -> None:
    """Read as an unsigned number, -1 is below a vocabulary of more ids than the type has."""
    limits = np.iinfo(stored)
    tokens = np.array([0, 1, limits.max], dtype=stored).repeat(50)
    for bad in (None, -1, -2, limits.min):
        if bad is not None:
            tokens[120] = bad
        tokens.tofile(tmp_path / "0.bin")
        reader = TokenReader([str(tmp_path / "0.bin")], [stored], [150])
        out = np.empty((1, 150), dtype=out_dtype)
        if bad is None:
            reader.read(np.array([0]), out, vocab_size)
            check_token_ids(tokens, vocab_size, "0.bin", 0)
            assert np.array_equal(out[0], tokens)
            continue
        with pytest.raises(DataError, match=f"token id {bad} at token offset 120 is not in the vocabulary"):
            reader.read(np.array([0]), out, vocab_size)
        with pytest.raises(DataError, match=f"token id {bad} at token offset 120 is not in the vocabulary"):
            check_token_ids(tokens, vocab_size, "0.bin", 0)


@pytest.mark.parametrize("bad", [2**16, 2**31 - 1, 2**32, 2**40 + 5, 2**63 - 1, -(2**63), -(2**32)])
def test_no_wide_id_wraps_into_the_vocabulary(tmp_path: Path, bad: int) -> None:
    np.full(100, bad, dtype=np.int64).tofile(tmp_path / "0.bin")
    reader = TokenReader([str(tmp_path / "0.bin")], ["int64"], [100])
    for dtype in (np.uint16, np.int32, np.int64):
        with pytest.raises(DataError, match=f"token id {bad} at token offset 3 "):
            reader.read(np.array([3]), np.empty((1, 50), dtype=dtype), 65_536)


def test_windows_outside_of_the_stream_are_refused(tmp_path: Path) -> None:
    reader, _, _ = write_bins(tmp_path)
    for start in (-1, 2200, 2**62, 2**63 - 1, -(2**63)):
        with pytest.raises(IndexError, match=f"window 1 of 5 tokens was asked for at token {start}, the shards have"):
            reader.read(np.array([0, start]), np.empty((2, 5), dtype=np.int64), 30_000)
    with pytest.raises(IndexError):
        reader.read(np.array([0]), np.empty((1, 2205), dtype=np.int64), 30_000)
    reader.read(np.array([2204]), np.empty((1, 0), dtype=np.int64), 30_000)


@pytest.mark.parametrize("dtype", [np.float64, np.uint64, np.int16, np.int8, bool, ">i8"])
def test_buffers_of_other_types_are_refused(tmp_path: Path, dtype: type) -> None:
    reader, _, _ = write_bins(tmp_path)
    with pytest.raises(TypeError, match=r"expected|must be int64, int32 or uint16"):
        reader.read(np.array([0]), np.empty((1, 5), dtype=dtype), 30_000)


def test_unsuitable_buffers_are_refused(tmp_path: Path) -> None:
    """Writing into a copy that numpy made, or beyond the end, would be silent."""
    reader, _, _ = write_bins(tmp_path)
    frozen = np.empty((2, 5), dtype=np.int64)
    frozen.flags.writeable = False
    unaligned = np.empty(82, dtype=np.uint8)[1:81].view(np.int64).reshape(2, 5)
    strided, short = np.empty((2, 10), dtype=np.int64)[:, ::2], np.empty((1, 5), dtype=np.int64)
    for out in (frozen, unaligned, strided, short, np.empty(10, dtype=np.int64), np.empty((5, 2)).T, [[0] * 5] * 2):
        with pytest.raises(TypeError):
            reader.read(np.array([0, 1]), out, 30_000)
    with pytest.raises(TypeError):
        reader.read(np.array([0.0]), short, 30_000)
    for dtype, vocab_size in ((np.uint16, 65_537), (np.int32, 2**31 + 1), (np.int64, 0), (np.int64, -1)):
        with pytest.raises(DataError, match=f"vocab_size is {vocab_size}, expected 1 to"):
            reader.read(np.array([0]), np.empty((1, 5), dtype=dtype), vocab_size)


def test_impossible_shards_are_refused() -> None:
    for arguments, message in [
        (([], [], []), "no shards"),
        ((["a"], ["uint16"], [0]), "a: holds 0 tokens"),
        ((["a", "b"], ["uint16"] * 2, [2**59, 2**60]), "b: holds"),
    ]:
        with pytest.raises(DataError, match=message):
            TokenReader(*arguments)
    for arguments in ((["a"], ["float32"], [1]), (["a"], ["uint16"], [1, 2])):
        with pytest.raises(TypeError):
            TokenReader(*arguments)


def test_threads_share_a_reader(tmp_path: Path, mapped: bool) -> None:
    """All touch the shards for the first time together, again and again, without the GIL."""
    _, stream, paths = write_bins(tmp_path)
    expected = np.lib.stride_tricks.sliding_window_view(stream, 900)
    for round_ in range(20):
        reader = TokenReader(list(map(str, paths)), DTYPES, LENGTHS)
        barrier = threading.Barrier(4)

        def read(seed: int, reader: TokenReader = reader, barrier: threading.Barrier = barrier) -> bool:
            starts = np.random.default_rng(seed).integers(0, len(expected), 50)
            out = np.empty((50, 900), dtype=np.int64)
            barrier.wait()
            reader.read(starts, out, 30_000)
            return np.array_equal(out, expected[starts])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(4 * round_, 4 * round_ + 4)))
        # maps and files that lost the race are gone
        assert Path("/proc/self/maps").read_text().count(str(tmp_path)) == (4 if mapped else 0)
        assert open_files(tmp_path) == (0 if mapped else 4)
    del read, reader
    assert open_files(tmp_path) == 0


def open_files(folder: Path) -> int:
    """Descriptors of this process that lead into `folder`."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return sum(os.readlink(link).startswith(f"{folder}/") for link in links if os.path.lexists(link))  # noqa: PTH115


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, when: str) -> None:
    """In a map its lost pages are a SIGBUS, which would end the process (hence one of its own) without a word; an I/O
    error and a stale file handle are one too. What is still there can be read on. Also where another handler of the
    signal is installed after the reader is made."""
    script = f"""
import faulthandler, os, sys, threading
import numpy as np
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards._indexed_dataset import TokenReader
{when == "before"} and faulthandler.enable()
path, tokens = sys.argv[1], 1 << 20
np.arange(tokens, dtype=np.int32).tofile(path)
reader = TokenReader([path], ["int32"], [tokens])
holders = [TokenReader(["/nowhere"] * {MOST_MAPS - 1}, ["uint16"] * {MOST_MAPS - 1}, [1] * {MOST_MAPS - 1})]
others = TokenReader([path], ["int32"], [tokens])
assert reader.mapped and not others.mapped
{when == "after"} and faulthandler.enable()
def read(one, start):
    out = np.empty((1, 5000), dtype=np.int64)
    one.read(np.array([start]), out, tokens)
    return out[0].tolist()
assert read(reader, 0) == read(others, 0) == list(range(5000))
os.truncate(path, 1 << 20)
def lost(one):
    for _ in range(50):
        if one is reader:
            assert read(one, 100_000) == list(range(100_000, 105_000))
        for start in (tokens - 5000, 260_000):
            try:
                read(one, start)
            except DataError as error:
                sys.stdout.write(str(error) + chr(10))
            else:
                sys.exit("no error")
threads = [threading.Thread(target=lost, args=(one,)) for one in (reader, others) * 2]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    path = tmp_path / "0.bin"
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 400
    # a reader that opens it anew finds the size wrong, one that has it open the end
    assert any(f"{path}: ends at byte 1048576, expected 4194304 bytes" in line for line in lines)
    assert all("ends at byte 1048576" in line or "is 1048576 bytes long, expected 4194304" in line for line in lines)


@pytest.mark.parametrize("how", ["touch", "kill"])
@pytest.mark.parametrize("handler", ["faulthandler.enable()", "pass"])
@pytest.mark.parametrize("later", ["faulthandler.enable()", "pass"])
def test_other_bus_errors_end_the_process_as_before(tmp_path: Path, how: str, handler: str, later: str) -> None:
    """Swallowing a SIGBUS that is not of a shard's map would repeat it forever, or hide it."""
    script = f"""
import faulthandler, mmap, os, signal, sys
import numpy as np
{handler}
from illada_megatron.data.shards._indexed_dataset import TokenReader
shard, other = sys.argv[1:]
np.arange(10, dtype=np.int32).tofile(shard)
TokenReader([shard], ["int32"], [10]).read(np.array([0]), np.empty((1, 10), dtype=np.int64), 10)
{later}  # hands it back to ours, before which ours is installed again
TokenReader([shard], ["int32"], [10]).read(np.array([0]), np.empty((1, 10), dtype=np.int64), 10)
with open(other, "wb+") as stream:
    stream.truncate(8192)
    view = mmap.mmap(stream.fileno(), 8192)
    stream.truncate(0)
view[5000] if {how == "touch"} else os.kill(os.getpid(), signal.SIGBUS)
"""
    paths = [str(tmp_path / name) for name in ("shard", "other")]
    result = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True)
    assert result.returncode == -signal.SIGBUS
    assert result.stderr.count("Fatal Python error: Bus error") == ({handler, later} != {"pass"})


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_processes_read_on(tmp_path: Path) -> None:
    """A fork while threads read (checkpoint writers are forked): no lock stays locked in the child, and neither
    moves the other's place in a file."""
    reader, stream, _ = write_bins(tmp_path)
    expected = np.lib.stride_tricks.sliding_window_view(stream, 900)
    stop = threading.Event()

    def read(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, len(expected), 50)
        out = np.empty((50, 900), dtype=np.int64)
        reader.read(starts, out, 30_000)
        return np.array_equal(out, expected[starts])

    def read_on(seed: int) -> bool:
        fine = True
        while not stop.is_set():
            fine &= read(seed)
        return fine

    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(read_on, seed) for seed in range(3)]
        for seed in range(20):
            if (child := os.fork()) == 0:
                os._exit(0 if read(100 + seed) else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        assert all(answer.result() for answer in answers)


def test_torchs_workers_take_the_signal_after_the_fork(tmp_path: Path) -> None:
    """The child has the parent's maps, and torch's handler in its own place, which ends it."""
    script = """
import os, sys
import numpy as np, torch
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards._indexed_dataset import TokenReader
path, tokens = sys.argv[1], 1 << 20
np.zeros(tokens, dtype=np.int32).tofile(path)
reader, out = TokenReader([path], ["int32"], [tokens]), np.empty((1, 5000), dtype=np.int64)
reader.read(np.array([0]), out, tokens)
class Windows(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        os.truncate(path, 1 << 20)
        try:
            reader.read(np.array([tokens - 5000]), out, tokens)
        except DataError as error:
            return str(error)
loader = torch.utils.data.DataLoader(Windows(), batch_size=None, num_workers=1, multiprocessing_context="fork")
print(*loader)
"""
    path = tmp_path / "0.bin"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(path)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{path}: is 1048576 bytes long, expected 4194304")


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    """It was waited for, for ever."""
    os.mkfifo(tmp_path / "0.bin")
    script = """
import sys
import numpy as np
from illada_megatron.data.shards._indexed_dataset import TokenReader
TokenReader(sys.argv[1:], ["uint16"], [1]).read(np.array([0]), np.empty((1, 1), dtype=np.int64), 9)
"""
    run = [sys.executable, "-c", script, str(tmp_path / "0.bin")]
    result = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert "0.bin: is no regular file" in result.stderr


INTERRUPTED = """
#include <dlfcn.h>
#include <errno.h>
#include <string.h>
static int interrupted(void) { static int calls = 0; errno = EINTR; return calls++ % 2 == 0; }
#define OPEN(name) \\
  int name(const char *path, int flags, int mode) { \\
    if (strstr(path, "/shard.") && interrupted()) return -1; \\
    return ((int (*)(const char *, int, int))dlsym(RTLD_NEXT, #name))(path, flags, mode); \\
  }
OPEN(open)
OPEN(open64)
int fsync(int file) {
  return interrupted() ? -1 : ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_calls_that_a_signal_interrupts_are_made_again(tmp_path: Path) -> None:
    """EINTR from each first open and fsync, as slow file servers give it."""
    (tmp_path / "shim.c").write_text(INTERRUPTED)
    build = ["cc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-fno-builtin", "-o", "shim.so", "shim.c"]
    subprocess.run(build, cwd=tmp_path, check=True)
    script = """
import sys
import numpy as np
from illada_megatron.data.shards._indexed_dataset import IndexedDatasetBuilder, OpenFile, TokenReader
builder = IndexedDatasetBuilder(sys.argv[1], ".tmp", 100)
builder.add(np.arange(10), [4, 6])
builder.finalize()
reader, out = TokenReader([sys.argv[1] + ".bin.tmp"], ["uint16"], [10]), np.empty((1, 10), dtype=np.int64)
reader.read(np.array([0]), out, 100)
assert out[0].tolist() == list(range(10))
assert OpenFile(sys.argv[1] + ".idx.tmp").read(0, 9) == b"MMIDIDX" + bytes(2)
"""
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so")}
    run = [sys.executable, "-c", script, str(tmp_path / "shard")]
    result = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")

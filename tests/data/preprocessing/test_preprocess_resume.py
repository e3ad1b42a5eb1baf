"""Killed at any moment and started again: the same bytes as a run that nobody disturbed, whoever did the work."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import sentencepiece
import zstandard

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess
from illada_megatron.data.preprocessing.worker import parts_of
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.manifest import read_manifest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def inputs(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """About 4 MB to be cut into ranges, and as much compressed, to be cut into parts."""
    directory = tmp_path_factory.mktemp("inputs")
    data = jsonl.read_bytes() * 4
    (directory / "a.jsonl").write_bytes(data)
    (directory / "b.jsonl.zst").write_bytes(zstandard.compress(data))
    return [directory]


def _contents(directory: Path) -> dict[str, bytes]:
    """Without the lock, which is always there and empty."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}


_WITH_A_THREAD = """
import runpy, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _command(inputs: list[Path], prefix: Path, tokenizer: Path, workers: int, threads: bool = False) -> list[str]:
    """threads: in a process with another thread, of which workers are no copies."""
    options = {"--shard-mb": "0.3", "--shuffle-seed": "1", "--tokenizer-engine": "reference", "--workers": str(workers)}
    arguments = [
        "--output-prefix",
        prefix,
        "--tokenizer",
        tokenizer,
        *(word for pair in options.items() for word in pair),
    ]
    python = [sys.executable, *(["-c", _WITH_A_THREAD] if threads else [])]
    return [*python, str(ROOT / "tools/preprocess_data.py"), *map(str, inputs), *map(str, arguments)]


def _start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def _finished(prefix: Path) -> int:
    return len(list(prefix.parent.glob(f"{prefix.name}_*.done.json")))


def _disturb(command: list[str], prefix: Path, kills: int, seed: int) -> None:
    """Kill the run, or all its processes, `kills` times, then let it finish. Each time it may finish none to two more
    shards, and then a random moment passes, so that kills hit it before, in and behind a shard."""
    generator = random.Random(seed)
    hits = 0
    for _ in range(kills):
        process = _start(command)
        enough, moment = _finished(prefix) + generator.randint(0, 2), generator.uniform(0, 0.2)
        while process.poll() is None and _finished(prefix) < enough:
            time.sleep(0.005)
        time.sleep(moment)
        alone = generator.random() < 0.5
        if process.poll() is None:
            hits += 1
            process.kill() if alone else os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert hits > kills // 2, f"only {hits} of {kills} kills hit a run at work: give it more to do"
    _, errors = (process := _start(command)).communicate()
    assert process.returncode == 0, errors


def _check_kills(inputs: list[Path], tokenizer: Path, directory: Path, kills: int, seed: int) -> None:
    options = PreprocessOptions(shard_mb=0.3, shuffle_seed=1, tokenizer_engine="reference", workers=1)
    made = preprocess(inputs, directory / "calm" / "out", tokenizer, options)
    assert made.shards > 12
    for workers in (1, 2):
        prefix = directory / f"disturbed{workers}" / "out"
        _disturb(_command(inputs, prefix, tokenizer, workers), prefix, kills, seed + workers)
        assert _contents(directory / f"disturbed{workers}") == _contents(directory / "calm")


def test_three_kills(inputs: list[Path], sentencepiece_path: Path, tmp_path: Path) -> None:
    _check_kills(inputs, sentencepiece_path, tmp_path, 3, 0)


@pytest.mark.slow
def test_twenty_five_kills(inputs: list[Path], huggingface_path: Path, tmp_path: Path) -> None:
    for copy in range(6):
        shutil.copytree(inputs[0], tmp_path / "in" / str(copy))
    _check_kills([tmp_path / "in"], huggingface_path, tmp_path, 25, 100)


def test_workers_leave_no_trace_in_the_bytes(inputs: list[Path], sentencepiece_path: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        options = PreprocessOptions(shard_mb=0.5, workers=workers, shuffle_seed=3)
        preprocess(inputs, tmp_path / f"with{workers}" / "out", sentencepiece_path, options)
    assert _contents(tmp_path / "with1") == _contents(tmp_path / "with2") == _contents(tmp_path / "with3")


def test_workers_use_the_engine_that_was_chosen(tmp_path: Path) -> None:
    """gigatoken reads a model with NFKC normalisation, but gives other ids."""
    pytest.importorskip("gigatoken")
    texts = [f"№ {number} ﬁne ① text ｗｉｄｅ" for number in range(3000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "nfkc"), vocab_size=100, minloglevel=2
    )
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    for engine in ("auto", "reference"):
        options = PreprocessOptions(shard_mb=0.02, workers=2, tokenizer_engine=engine)
        preprocess([tmp_path / "text.jsonl"], tmp_path / engine / "out", tmp_path / "nfkc.model", options)
    assert _contents(tmp_path / "auto") == _contents(tmp_path / "reference")


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
@pytest.mark.parametrize("threads", [False, True])
def test_workers_are_forked_where_there_is_no_other_thread(
    threads: bool, inputs: list[Path], huggingface_path: Path, tmp_path: Path
) -> None:
    process = _start(_command(inputs, tmp_path / "out", huggingface_path, 2, threads=threads))
    while len(workers := psutil.Process(process.pid).children()) < 2 or not _finished(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.01)
    own = psutil.Process(process.pid).cmdline()
    assert [worker.cmdline() == own for worker in workers] == [not threads, not threads]
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.parametrize(("workers", "threads"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop(
    number: signal.Signals, workers: int, threads: bool, inputs: list[Path], sentencepiece_path: Path, tmp_path: Path
) -> None:
    """By a batch system, or at the keyboard: it lets go of the prefix, so that the next one waits for nobody."""
    command = _command(inputs, tmp_path / "out", sentencepiece_path, workers, threads=threads)
    process = _start(command)
    while not _finished(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert "stopped; finished shards are kept: run the same command again, without --overwrite, to continue" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out.lock.json").exists()
    assert not any(child.is_running() for child in children)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "were finished before" in again.stdout


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error", "a", None, "b"),
        OSError(errno.EIO, "Input/output error", 7),
        FileNotFoundError(errno.ENOENT, "No such file or directory", b"a"),
        OSError(errno.EIO, "Input/output error"),
        OSError("words alone"),
    ],
    ids=str,
)
def test_an_error_of_the_system_is_the_same_elsewhere(error: OSError) -> None:
    again = OSError(*parts_of(error))
    assert type(again) is type(error)
    assert str(again) == str(error).replace("b'a'", "'a'")


def test_a_defect_in_a_worker_is_told() -> None:
    """An interpreter that is taken apart while a thread waits for stdin aborts: "killed by SIGABRT" says nothing."""
    code = """
        from illada_megatron.data.preprocessing import worker
        def run(self, *_):
            import threading
            threading.Thread(target=self.listen, daemon=True).start()
            raise MemoryError("as it happens")
        worker._Worker.run = run
        worker.main()
    """
    line = [sys.executable, "-c", textwrap.dedent(code), "1"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "MemoryError: as it happens" in process.stderr.read()
        assert process.wait() == 1


@pytest.mark.parametrize("threads", [False, True])
def test_a_dead_worker_ends_the_run_with_a_message(
    threads: bool, inputs: list[Path], sentencepiece_path: Path, tmp_path: Path
) -> None:
    """As the kernel does it when memory runs out. Finished shards stay, the others leave nothing."""
    command = _command(inputs, tmp_path / "out", sentencepiece_path, 2, threads=threads)
    process = _start(command)
    while not _finished(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.02)
    psutil.Process(process.pid).children()[0].kill()
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "a worker was killed by SIGKILL (out of memory?" in errors
    assert "run the same command again, without --overwrite, to continue" in errors
    assert "Traceback" not in errors
    again = _start(command)
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "tasks were finished before" in output
    assert not list(tmp_path.glob("*.tmp"))


def test_a_finished_job_is_not_done_again(inputs: list[Path], sentencepiece_path: Path, tmp_path: Path) -> None:
    options = PreprocessOptions(shard_mb=2)
    first = preprocess(inputs, tmp_path / "out", sentencepiece_path, options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = preprocess(inputs, tmp_path / "out", sentencepiece_path, options)
    assert again.was_finished
    assert not first.was_finished
    assert again.counts == first.counts
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "out_00000.bin").unlink()
    with pytest.raises(DataError, match=r"out_00000\.bin: is missing, though the job has finished.*--overwrite"):
        preprocess(inputs, tmp_path / "out", sentencepiece_path, options)


def test_another_job_is_refused_unless_told_to_overwrite(
    inputs: list[Path], sentencepiece_path: Path, huggingface_path: Path, jsonl: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "out"
    preprocess(inputs, prefix, sentencepiece_path, PreprocessOptions(shard_mb=1))
    other = [
        (inputs, sentencepiece_path, PreprocessOptions(shard_mb=2), "shard_bytes was 1000000, now 2000000"),
        (inputs, huggingface_path, PreprocessOptions(shard_mb=1), "tokenizer_sha256 was"),
        ([jsonl], sentencepiece_path, PreprocessOptions(shard_mb=1), "its inputs were others"),
    ]
    before = _contents(tmp_path)
    for paths, tokenizer, options, message in other:
        with pytest.raises(DataError, match=rf"another job has written shards here \(.*{message}.*--overwrite"):
            preprocess(paths, prefix, tokenizer, options)
    assert _contents(tmp_path) == before
    preprocess([jsonl], prefix, sentencepiece_path, PreprocessOptions(shard_mb=2, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.bin",
        "out.idx",
        "out.job.json",
        "out.lock",
        "out.manifest.json",
    ]


def test_shards_of_unknown_origin_are_not_replaced(jsonl: Path, sentencepiece_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out.bin").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"out\.bin: there already.*--overwrite"):
        preprocess([jsonl], tmp_path / "out", sentencepiece_path)
    assert _contents(tmp_path) == {"out.bin": b"precious"}


def test_two_runs_at_a_time_do_not_meet(inputs: list[Path], sentencepiece_path: Path, tmp_path: Path) -> None:
    """The second one is refused and harms nothing, whether it is the same job or another."""
    command = _command(inputs, tmp_path / "out", sentencepiece_path, 2)
    first = _start(command)
    while not (tmp_path / "out.job.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it must not end before the others have tried, however slowly they start
    for more in ([], ["--shard-mb", "3"], ["--overwrite"]):
        second = _start([*command, *more])
        _, errors = second.communicate()
        assert second.returncode == 2
        assert "another process is making this corpus" in errors
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate()
    assert first.returncode == 0, errors


def test_several_keys_give_several_corpora(sentencepiece_path: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a text", "title": "T"}\n{"text": "b", "title": ""}\n')
    keys = ["--json-keys", "text", "--json-keys", "title"]
    process = _start([*_command([tmp_path / "in.jsonl"], tmp_path / "out", sentencepiece_path, 1), *keys])
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "1 document," in output
    for key, documents in (("text", 2), ("title", 1)):
        (shard,) = read_manifest(tmp_path / f"out_{key}_document.manifest.json").shards
        assert shard.path == f"out_{key}_document"
        assert IndexedDataset(tmp_path / shard.path).num_documents == documents

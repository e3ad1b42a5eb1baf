"""Jobs that meet under one prefix, with locks and without: a finished corpus stays what it is."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing import claim, produce_corpus, records
from illada_megatron.data.preprocessing.document_encoder import DocumentEncoder
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess
from illada_megatron.data.shards.inspect import verify_shard
from illada_megatron.data.shards.shard_list import find_shards

ROOT = Path(__file__).parents[3]
SMALL = PreprocessOptions(shard_mb=0.3, workers=1, tokenizer_engine="reference")
LARGE = PreprocessOptions(shard_mb=0.6, workers=1, tokenizer_engine="reference")


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}


def _whole(prefix: Path) -> bool:
    """The manifest is there, and every shard is what it says."""
    shards = find_shards([f"{prefix}.manifest.json"])
    return [problem for shard in shards for problem in verify_shard(shard)] == []


def _without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["locks", "no locks"])
def has_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", _without_locks)
    return request.param == "locks"


def _interrupt(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], object], before: bool
) -> list[object]:
    """Do `action` once, when `owner.name` is next called: before or after what that does. Its result goes into the
    list that is given: what it returned, or the message of its DataError."""
    original = getattr(owner, name)
    results: list[object] = []

    def act() -> None:
        if not results:
            results.append(None)  # what the action itself calls is not interrupted
            try:
                results[0] = action()
            except DataError as error:
                results[0] = str(error)

    def call(*args: Any, **kwargs: Any) -> Any:
        if before:
            act()
        result = original(*args, **kwargs)
        act()
        return result

    monkeypatch.setattr(owner, name, call)
    return results


def test_a_job_that_comes_between_looking_and_claiming(
    has_locks: bool, jsonl: Path, sentencepiece_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, or it finishes and the first one is: its corpus is never removed by the other."""
    prefix = tmp_path / "out"
    second = _interrupt(
        monkeypatch, claim, "_check_free", lambda: preprocess([jsonl], prefix, sentencepiece_path, LARGE), before=False
    )
    if has_locks:
        preprocess([jsonl], prefix, sentencepiece_path, SMALL)
        assert "out.lock: another process is making this corpus" in str(second[0])
    else:
        with pytest.raises(DataError, match=r"out\.job\.json: there already"):
            preprocess([jsonl], prefix, sentencepiece_path, SMALL)
        assert isinstance(second[0], produce_corpus.PreprocessSummary)
    assert _whole(prefix)


def test_another_job_that_comes_while_one_is_at_work(
    has_locks: bool, jsonl: Path, sentencepiece_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "out"
    second = _interrupt(
        monkeypatch,
        DocumentEncoder,
        "encode",
        lambda: preprocess([jsonl], prefix, sentencepiece_path, LARGE),
        before=True,
    )
    preprocess([jsonl], prefix, sentencepiece_path, SMALL)
    expected = "another process is making this corpus" if has_locks else "another job has begun here .* no locks"
    assert re.search(expected, str(second[0]))
    assert _whole(prefix)


def test_the_same_job_twice_without_locks(
    jsonl: Path, sentencepiece_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a task that Ray does again beside a node it has lost sight of: both write, the bytes are the same."""
    monkeypatch.setattr(fcntl, "flock", _without_locks)
    prefix = tmp_path / "out"
    second = _interrupt(
        monkeypatch,
        DocumentEncoder,
        "encode",
        lambda: preprocess([jsonl], prefix, sentencepiece_path, SMALL),
        before=True,
    )
    first = preprocess([jsonl], prefix, sentencepiece_path, SMALL)
    assert isinstance(second[0], produce_corpus.PreprocessSummary)
    assert first.counts == second[0].counts
    assert _whole(prefix)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (DocumentEncoder, "encode", "lost the prefix to another"),
        (records, "require_claim", "was removed before it got its name"),
    ],
    ids=["at work", "about to publish"],
)
def test_a_job_that_was_taken_for_dead(
    owner: Any,
    name: str,
    message: str,
    jsonl: Path,
    sentencepiece_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without locks, another one has taken its prefix with --overwrite and has finished: it harms nothing any more,
    though it looked at the claim just before."""
    monkeypatch.setattr(fcntl, "flock", _without_locks)
    prefix = tmp_path / "out"

    def take_over() -> dict[str, bytes]:
        preprocess([jsonl], prefix, sentencepiece_path, PreprocessOptions(**{**vars(LARGE), "overwrite": True}))
        return _contents(tmp_path)

    second = _interrupt(monkeypatch, owner, name, take_over, before=False)
    with pytest.raises(DataError, match=message):
        preprocess([jsonl], prefix, sentencepiece_path, SMALL)
    assert _contents(tmp_path) == second[0]
    assert _whole(prefix)


FOUR = """
import sys
from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, preprocess
source, tokenizer = sys.argv[1:]
options = PreprocessOptions(shard_mb=0.5, workers=1, tokenizer_engine="reference", log_interval_seconds=0)
print("ready", flush=True)
for prefix in sys.stdin:
    try:
        preprocess([source], prefix.strip(), tokenizer, options)
        print("OK", flush=True)
    except DataError as error:
        print(error, flush=True)
"""
NO_LOCKS = "#include <errno.h>\nint flock(int file, int how) { (void)file, (void)how; errno = ENOLCK; return -1; }\n"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("locks", [True, False])
def test_four_jobs_released_together(
    locks: bool, texts: list[str], jsonl: Path, sentencepiece_path: Path, tmp_path: Path
) -> None:
    """The same job, five times: each time somebody finishes it, and whoever does not says why."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(jsonl.read_bytes().splitlines(keepends=True)[:8]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not locks:
        (tmp_path / "shim.c").write_text(NO_LOCKS)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", "shim.so", "shim.c"], cwd=tmp_path, check=True)
        environment["LD_PRELOAD"] = str(tmp_path / "shim.so")
    run = [sys.executable, "-c", FOUR, str(source), str(sentencepiece_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    jobs = [subprocess.Popen(run, text=True, env=environment, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    assert [job.stdout.readline() for job in jobs] == ["ready\n"] * 4
    for number in range(5):
        prefix = tmp_path / f"out{number}"
        for job in jobs:
            job.stdin.write(f"{prefix}\n")
            job.stdin.flush()
        answers = [job.stdout.readline().strip() for job in jobs]
        refused = [answer for answer in answers if answer != "OK"]
        assert len(refused) < 4
        assert [answer for answer in refused if "another process is making this corpus" not in answer] == []
        assert locks or not refused
        assert _whole(prefix)
        assert not list(tmp_path.glob("*.tmp"))
    for job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors


def test_a_failed_job_leaves_the_prefix_to_others(jsonl: Path, sentencepiece_path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        preprocess([bad], tmp_path / "out", sentencepiece_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "out.lock"]
    preprocess([jsonl], tmp_path / "out", sentencepiece_path)
    assert _whole(tmp_path / "out")


def test_corpora_whose_names_are_those_of_shards(jsonl: Path, sentencepiece_path: Path, tmp_path: Path) -> None:
    """`web` and `web_00001`: neither removes or writes a file of the other, whatever comes first."""
    over_large, over_small = (
        PreprocessOptions(**{**vars(options), "overwrite": True})
        for options in (PreprocessOptions(tokenizer_engine="reference"), SMALL)
    )
    for name in ("web", "web_00001"):
        preprocess([jsonl], tmp_path / name, sentencepiece_path, over_large)
    numbered = {name: data for name, data in _contents(tmp_path).items() if name.startswith("web_00001.")}
    assert len(numbered) == 4
    preprocess([jsonl], tmp_path / "web", sentencepiece_path, over_large)
    before = _contents(tmp_path)
    assert numbered.items() <= before.items()
    with pytest.raises(DataError, match=r"web_00001\.\w+: there already, of the corpus .*web_00001"):
        preprocess([jsonl], tmp_path / "web", sentencepiece_path, over_small)
    assert _contents(tmp_path) == before

    (tmp_path / "many").mkdir()
    preprocess([jsonl], tmp_path / "many" / "web", sentencepiece_path, SMALL)
    before = _contents(tmp_path / "many")
    assert "web_00001.bin" in before
    with pytest.raises(DataError, match=r"web_00001: is the name of a shard of the corpus .*/web"):
        preprocess([jsonl], tmp_path / "many" / "web_00001", sentencepiece_path, over_large)
    assert _contents(tmp_path / "many") == before


def test_overwriting_leaves_files_that_no_record_names(jsonl: Path, sentencepiece_path: Path, tmp_path: Path) -> None:
    """A shard of another tool, called as if it were of the corpus, is not removed, and not read as part of it."""
    options = PreprocessOptions(tokenizer_engine="reference", overwrite=True)
    preprocess([jsonl], tmp_path / "web", sentencepiece_path, options)
    (tmp_path / "web_00007.bin").write_bytes(b"precious")
    preprocess([jsonl], tmp_path / "web", sentencepiece_path, options)
    assert (tmp_path / "web_00007.bin").read_bytes() == b"precious"
    small = PreprocessOptions(shard_mb=0.1, workers=1, tokenizer_engine="reference", overwrite=True)
    with pytest.raises(DataError, match=r"web_00007\.bin: there already, and no web\.job\.json says"):
        preprocess([jsonl], tmp_path / "web", sentencepiece_path, small)
    assert (tmp_path / "web_00007.bin").read_bytes() == b"precious"
    assert _whole(tmp_path / "web")


def test_a_shard_that_was_cut_short_is_noticed(jsonl: Path, sentencepiece_path: Path, tmp_path: Path) -> None:
    """By its size, when the job is asked for again."""
    preprocess([jsonl], tmp_path / "out", sentencepiece_path)
    size = (tmp_path / "out.bin").stat().st_size
    os.truncate(tmp_path / "out.bin", size - 2)
    with pytest.raises(
        DataError, match=rf"out\.bin: has {size - 2} bytes, expected {size}, though the job has finished"
    ):
        preprocess([jsonl], tmp_path / "out", sentencepiece_path)
    os.truncate(tmp_path / "out.bin", size)
    (tmp_path / "out.idx").write_bytes(b"")
    with pytest.raises(DataError, match=r"out\.idx: has 0 bytes, expected \d+, though the job has finished"):
        preprocess([jsonl], tmp_path / "out", sentencepiece_path)


def test_a_damaged_shard_without_a_record_is_named(
    jsonl: Path, sentencepiece_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a power failure leaves it: what the message says to remove is what is in the way."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(produce_corpus, "_publish", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess([jsonl], tmp_path / "out", sentencepiece_path, SMALL)
    (tmp_path / "out_00001.done.json").unlink()
    (tmp_path / "out_00001.bin").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"out_00001\.bin: there already.*damaged.*remove this file and run"
        ) as error:
            preprocess([jsonl], tmp_path / "out", sentencepiece_path, SMALL)
    Path(str(error.value).partition(":")[0]).unlink()
    preprocess([jsonl], tmp_path / "out", sentencepiece_path, SMALL)
    assert _whole(tmp_path / "out")


def test_a_shard_that_vanished_before_the_end_is_not_listed(
    jsonl: Path, sentencepiece_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "OK" and a missing index is what two writers of one file made of it."""
    _interrupt(monkeypatch, produce_corpus, "_publish", (tmp_path / "out_00001.idx").unlink, before=True)
    with pytest.raises(DataError, match=r"out_00001\.idx: is missing, though this run has written it"):
        preprocess([jsonl], tmp_path / "out", sentencepiece_path, SMALL)
    assert not (tmp_path / "out.manifest.json").exists()


ONE_CORE = """
import os, sys
from illada_megatron.data.preprocessing import produce_corpus
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def refuse(*_):
    raise SystemExit("started workers")
produce_corpus.WorkerPool = refuse
options = produce_corpus.PreprocessOptions(shard_mb=0.3, tokenizer_engine="reference")
produce_corpus.preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], options)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores, to be given one of")
def test_workers_are_as_many_as_the_cores_it_may_use(jsonl: Path, sentencepiece_path: Path, tmp_path: Path) -> None:
    """As Slurm gives a step some of a node's cores."""
    run = [sys.executable, "-c", ONE_CORE, str(jsonl), str(tmp_path / "out"), str(sentencepiece_path)]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert _whole(tmp_path / "out")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000])
def test_a_record_of_another_program_is_no_unfinished_job(content: bytes, tmp_path: Path, write_shard) -> None:
    write_shard("web_00000", [[1, 2]])
    (tmp_path / "web.job.json").write_bytes(content)
    assert len(find_shards([f"{tmp_path}/web_*"])) == 1


def test_a_glob_of_an_unfinished_job_is_no_corpus(jsonl: Path, sentencepiece_path: Path, tmp_path: Path) -> None:
    """Stopped by a bad line in a later shard: the shards that are there would be a smaller corpus without a word."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl.read_bytes() + b"{bad\n")
    made = tmp_path / "made"
    with pytest.raises(DataError, match="not valid JSON"):
        preprocess([source], made / "web", sentencepiece_path, SMALL)
    shards = sorted(made.glob("web_*.idx"))
    assert shards
    for given in (f"{made}/web_*", str(made)):
        with pytest.raises(
            DataError, match=r"matches shards of .*/web, whose job has not finished \(.*web\.job\.json\)"
        ):
            find_shards([given])
    assert len(find_shards([str(path.with_suffix("")) for path in shards])) == len(shards)
    preprocess([source], made / "web", sentencepiece_path, PreprocessOptions(**{**vars(SMALL), "skip_bad_lines": True}))
    assert len(find_shards([f"{made}/web_*"])) == len(find_shards([made])) > len(shards)

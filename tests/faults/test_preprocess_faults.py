"""A fault at each call of `illada preprocess`: one run each, and one without a fault behind it.

A disturbed run ends with 0 and the right bytes, or with an exit code and a message; started again it ends with the same
bytes as a run that nobody disturbed. A finished corpus stays what it is, whatever befalls those who look at it.
"""

import errno
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from faults.injection import Call, Fault, Injection, library
from faults.power_loss import Disk, Tree, read_tree, replayed, tree_digest, write_tree
from faults.training_run import HANG_SECONDS, Place, Problems, places
from fork_server import ForkServer

from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece

MODULES = ("illada_megatron.data.preprocessing.produce_corpus", "sentencepiece")
_WRITING = ("write", "fsync", "rename", "unlink", "rmdir", "mkdir", "truncate", "fallocate", "link", "copy_file_range")
_ANSWERED = ("rename", "fsync", "unlink", "mkdir", "link")
_GROWING = ("open", "write", "mkdir", "rename", "truncate", "fallocate", "link")


@dataclass(frozen=True)
class Corpora:
    """A place with inputs, a tokenizer and outputs, and what is right there."""

    base: Path
    faults: Injection
    server: ForkServer
    outputs: Path
    inputs: tuple[Path, ...]
    tokenizer: Path

    def recorded(self, *more: str) -> tuple[int | None, str, list[Call]]:
        """`run`, and its journal."""
        self.faults.keep("contents")
        code, said = self.run(*more)
        self.faults.keep("no")
        calls = self.faults.journal()
        self.faults.forget()
        return code, said, calls

    @property
    def out(self) -> Path:
        return self.base / "out"

    def run(self, *more: str) -> tuple[int | None, str]:
        """Exit code (below 0: the signal, None: it hung) and what was said."""
        self.outputs.unlink(missing_ok=True)
        arguments = [
            *("preprocess", *map(str, self.inputs), "--tokenizer", str(self.tokenizer), "--workers", "1"),
            *("--output-prefix", str(self.out / "web"), "--tokenizer-engine", "reference", "--shuffle-seed", "1"),
            *("--shard-mb", "0.008", "--log-interval", "0", *more),
        ]
        (code,) = self.server.wait([self.server.start(arguments, self.outputs, self.faults.environment)], HANG_SECONDS)
        return code, self.outputs.read_text()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpora]:
    """Two files, one to be cut into two ranges, one compressed and cut into two parts."""
    place = tmp_path_factory.mktemp("preprocess")
    base = place / "base"
    for name in ("in", "out"):
        (base / name).mkdir(parents=True)
    texts = [f"document {number}: " + " ".join(str(number * k % 97) for k in range(40)) for number in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (base / "in" / "a.jsonl").write_bytes(lines)
    (base / "in" / "b.jsonl.zst").write_bytes(zstandard.compress(lines))
    tokenizer = train_sentencepiece([base / "in" / "a.jsonl"], base / "tokenizer.model", vocab_size=290)
    with ForkServer(MODULES, {"LD_PRELOAD": str(library())}) as server:
        yield Corpora(
            base,
            Injection(place / "faults", base),
            server,
            place / "output",
            (base / "in" / "a.jsonl", base / "in" / "b.jsonl.zst"),
            tokenizer,
        )


@dataclass(frozen=True)
class Clean:
    """An undisturbed run, from an empty place."""

    tree: Tree
    """Of the outputs."""
    before: Tree
    places: list[Place]


NEIGHBOUR: Tree = {"website.bin": b"1234", "website.idx": b"56", "web": None, "web/x": b"7"}


@pytest.fixture(scope="module")
def clean(corpora: Corpora) -> Clean:
    write_tree(NEIGHBOUR, corpora.out)
    code, said, calls = corpora.recorded()
    assert code == 0, said
    tree = read_tree(corpora.out)
    shards = [path for path in tree if path.endswith(".idx") and path not in NEIGHBOUR]
    assert len(shards) in (3, 4), shards
    return Clean(tree, NEIGHBOUR, places(calls, 0, 2))


@dataclass(frozen=True)
class Trial:
    place: Place
    how: dict[str, object]

    def __str__(self) -> str:
        named = {key: errno.errorcode[value] if key == "error" else value for key, value in self.how.items()}  # type: ignore[index]
        return f"{self.place}: {named}"

    def fault(self) -> Fault:
        return self.place.fault(0, **self.how)


def trials(found: Sequence[Place]) -> list[Trial]:
    """What can befall each call."""
    trials = []
    for place in found:
        if place.name in ("stat", "readdir", "close", "access"):
            trials += [Trial(place, {"error": errno.EIO})] if place.nth == 1 else []
            continue
        trials += [Trial(place, {"error": errno.EIO, "times": times}) for times in (1, None)]
        if place.name in _GROWING and place.path.startswith("out"):
            trials.append(Trial(place, {"error": errno.ENOSPC, "times": None}))
        if place.name in _ANSWERED:
            trials.append(Trial(place, {"error": errno.EIO, "action": "fail_after"}))
        if place.name in ("fsync", "open", "write"):
            trials.append(Trial(place, {"error": errno.EINVAL, "times": None}))
        if place.name in ("flock", "link"):
            trials += [Trial(place, {"error": error, "times": None}) for error in (errno.ENOLCK, errno.EOPNOTSUPP)]
        if place.name in ("read", "pread", "write"):
            trials.append(Trial(place, {"action": "short", "argument": 100}))
        if place.name in ("read", "pread"):
            trials.append(Trial(place, {"action": "short", "argument": 0}))
        if place.name in (*_WRITING, "open", "flock") and place.path.startswith("out"):
            trials.append(Trial(place, {"action": "kill"}))
    return trials


def disturb(corpora: Corpora, clean: Clean, row: Sequence[Trial]) -> list[str]:
    """A run for each trial from an empty place, and one behind it where it is not done. Returns what was wrong, and
    prints figures."""
    problems, struck, codes = Problems(), 0, dict[int | None, int]()
    for trial in row:
        write_tree(clean.before, corpora.out)
        corpora.faults.arm(trial.fault())
        code, said = corpora.run()
        fired = corpora.faults.fired()
        corpora.faults.arm()
        struck += fired > 0
        codes[code] = codes.get(code, 0) + 1
        found = read_tree(corpora.out)
        if fired and (why := _wrong(trial, code, said, found, clean)) is not None:
            problems.add(f"{trial}: {why}")
        if code == 0 and found == clean.tree:
            continue
        again, said = corpora.run()
        found = read_tree(corpora.out)
        if again != 0:
            problems.add(f"{trial}: ended with {code}, and the run behind it with {again}: {_end(said)}")
        elif found != clean.tree:
            problems.add(f"{trial}: ended with {code}; after the run behind it {_differences(found, clean.tree)}")
    print(
        f"{len({trial.place for trial in row})} calls, {len(row)} faults, {struck} struck, exit codes {codes}, "
        f"{len(problems)} problems"
    )
    return problems


def _wrong(trial: Trial, code: int | None, said: str, found: Tree, clean: Clean) -> str | None:
    if any(found.get(path, b"?") != content for path, content in clean.before.items()):
        return f"ended with {code} and has touched what is not its own: {_end(said)}"
    if trial.how.get("action") == "kill":
        return None if code == -signal.SIGKILL else f"ended with {code}: {_end(said)}"
    if code == 0:
        return None if found == clean.tree else f"ended with 0: {_differences(found, clean.tree)}"
    if code not in (1, 2):
        return f"ended with {code}: {_end(said)}"
    if not _has_message(said):
        return f"ended with {code} and no message of its own: {_end(said)}"
    if code == 2 and trial.how.get("error") in (errno.EIO, errno.ENOSPC):
        return f"ended with 2, though the disk may come back: {_end(said)}"
    return None


def _has_message(said: str) -> bool:
    """Of the program, or of typer, which looks at paths among the arguments."""
    return ("illada: error" in said or "Invalid value" in said) and "Traceback" not in said


def _end(said: str) -> str:
    return said.strip()[-300:]


def _differences(found: Tree, expected: Tree) -> str:
    names = sorted(path for path in {*found, *expected} if found.get(path, b"?") != expected.get(path, b"?"))
    return f"these differ or are too many or missing: {names}"


def _spread(row: Sequence[Trial], count: int) -> list[Trial]:
    """So many of them, from the first to the last."""
    return [row[number * len(row) // count] for number in range(count)]


def test_a_sample_of_faults(corpora: Corpora, clean: Clean) -> None:
    problems = disturb(corpora, clean, _spread(trials(clean.places), 16))
    assert not problems, "\n".join(problems)


def test_a_note_that_reads_as_nothing(corpora: Corpora, clean: Clean) -> None:
    """It is nobody else's for that: it would stay behind, and the next job would look for its owner."""
    row = [
        trial
        for trial in trials(clean.places)
        if (trial.place.name, trial.place.path) == ("read", "out/web.lock.json") and trial.how.get("action") == "short"
    ]
    assert row
    problems = disturb(corpora, clean, row)
    assert not problems, "\n".join(problems)


def test_a_disk_that_is_full_for_a_worker(corpora: Corpora, clean: Clean) -> None:
    """Other processes do the work: what the system refuses them ends the command as if it had been refused itself."""
    write_tree(clean.before, corpora.out)
    corpora.faults.arm(Fault("write", "out/web_*", error=errno.ENOSPC, times=None))
    code, said = corpora.run("--workers", "2")
    assert corpora.faults.fired() > 0
    corpora.faults.arm()
    assert code == 1, said
    assert "No space left on device" in said
    assert corpora.run("--workers", "2")[0] == 0
    assert read_tree(corpora.out) == clean.tree


@pytest.mark.slow
def test_every_fault(corpora: Corpora, clean: Clean) -> None:
    problems = disturb(corpora, clean, trials(clean.places))
    assert not problems, "\n".join(problems)


def look_at(
    corpora: Corpora, clean: Clean, more: Sequence[str], choose: Callable[[list[Trial]], list[Trial]]
) -> list[str]:
    """Disturbed runs on a finished corpus: it stays as it is."""
    write_tree(clean.tree, corpora.out)
    expected, said, calls = corpora.recorded(*more)
    assert read_tree(corpora.out) == clean.tree, said
    row = choose(trials(places(calls, 0, 2)))
    problems, codes = Problems(), dict[int | None, int]()
    for trial in row:
        corpora.faults.arm(trial.fault())
        code, said = corpora.run(*more)
        corpora.faults.arm()
        codes[code] = codes.get(code, 0) + 1
        if (found := read_tree(corpora.out)) != clean.tree:
            problems.add(f"{trial}: ended with {code}: {_differences(found, clean.tree)}: {_end(said)}")
            write_tree(clean.tree, corpora.out)
        if code is None or (code > 0 and not _has_message(said)):
            problems.add(f"{trial}: ended with {code} and no message of its own: {_end(said)}")
    print(f"{' '.join(more) or 'again'}: {len(row)} faults, exit codes {codes} (undisturbed {expected})")
    return problems


SAME_JOB, ANOTHER_JOB = (), ("--no-append-eod",)


@pytest.mark.parametrize("more", [SAME_JOB, ANOTHER_JOB])
def test_finished_corpus_stays(corpora: Corpora, clean: Clean, more: tuple[str, ...]) -> None:
    """A sample of what befalls the same job when it is started again, and another one that is refused."""
    problems = look_at(corpora, clean, more, lambda row: _spread(row, min(8, len(row))))
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("more", [SAME_JOB, ANOTHER_JOB])
def test_finished_corpus_stays_whatever_happens(corpora: Corpora, clean: Clean, more: tuple[str, ...]) -> None:
    problems = look_at(corpora, clean, more, list)
    assert not problems, "\n".join(problems)


def after_power_losses(corpora: Corpora, clean: Clean, choose: Callable[[list[Tree]], list[Tree]]) -> list[str]:
    """A run after each state of the disk that a power loss can leave: the same bytes, or a message that names what to
    remove. Behind the end of the run all is there."""
    write_tree(clean.before, corpora.out)
    disk = Disk.of(corpora.base)
    code, said, journal = corpora.recorded()
    assert code == 0, said
    states: dict[bytes, Tree] = {}
    for _, now in replayed(disk, journal):
        for _, tree in now.power_losses():
            states.setdefault(tree_digest(tree), _outputs(tree))
    last = [_outputs(tree) for _, tree in disk.power_losses()]
    problems = Problems()
    for tree in last:
        if _kept(tree) != _kept(clean.tree):
            problems.add(f"at the end: {_differences(tree, clean.tree)}")
    chosen, refused = choose(list(states.values())), 0
    for tree in chosen:
        write_tree(tree, corpora.out)
        code, said = corpora.run()
        if code != 0:
            refused += 1
            if not _has_message(said):
                problems.add(f"{_sizes(tree)}: ended with {code}: {_end(said)}")
        elif (found := read_tree(corpora.out)) != clean.tree:
            problems.add(f"{_sizes(tree)}: {_differences(found, clean.tree)}")
    print(
        f"{len(journal)} calls, {len(states)} states of the disk, {len(chosen)} of them started from, {refused} refused"
    )
    return problems


def _outputs(tree: Tree) -> Tree:
    return {path.removeprefix("out/"): content for path, content in tree.items() if path.startswith("out/")}


def _kept(tree: Tree) -> Tree:
    """Without records of single tasks, whose removal need not be durable."""
    return {path: content for path, content in tree.items() if not path.endswith((".done.json", ".tmp"))}


def _sizes(tree: Tree) -> str:
    return ", ".join(f"{path} {'/' if content is None else len(content)}" for path, content in sorted(tree.items()))


def test_a_sample_of_power_losses(corpora: Corpora, clean: Clean) -> None:
    problems = after_power_losses(corpora, clean, lambda row: row[:: max(1, len(row) // 12)])
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_every_power_loss(corpora: Corpora, clean: Clean) -> None:
    problems = after_power_losses(corpora, clean, list)
    assert not problems, "\n".join(problems)

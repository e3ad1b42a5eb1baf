"""A fault at each system call of a save of two ranks: no checkpoint is lost, what is said is true, the run goes on.

One run saves at each step and is stopped, before each save, in its first call: the test looks at the directory,
chooses the next fault, and lets it go on. So one start of processes serves for all faults that a run survives. Between
two saves that are disturbed lies one that is not.
"""

import errno
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults.injection import Call, Injection
from faults.power_loss import Disk, Tree, replayed, tree_digest, write_tree
from faults.training_run import (
    AHEAD,
    SAVE_DIR,
    Place,
    Problems,
    Ranks,
    breakpoints,
    digest,
    directory,
    newest,
    places,
    tiny,
    told,
    wait_for_save,
)
from fork_server import ForkServer

from illada_megatron.checkpoint.store import RECORD

# whose failing after it was done leaves no descriptor open
_ANSWERED = ("rename", "fsync", "mkdir", "unlink", "rmdir", "close")
_GROWING = ("open", "write", "mkdir", "rename", "truncate", "fallocate", "copy_file_range", "fsync")


@dataclass(frozen=True)
class Trial:
    """A fault at a call of a save."""

    place: Place
    how: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        named = {key: errno.errorcode.get(value, value) if key == "error" else value for key, value in self.how.items()}
        return f"{self.place}: {named}"


def trials(found: Sequence[Place]) -> list[Trial]:
    """What can befall each call that a run survives."""
    trials = []
    for place in found:
        trials += [Trial(place, {"error": errno.EIO}), Trial(place, {"error": errno.EIO, "times": None})]
        if place.name in _GROWING:
            trials.append(Trial(place, {"error": errno.ENOSPC, "times": None}))
        if place.name in _ANSWERED:
            trials.append(Trial(place, {"error": errno.EIO, "action": "fail_after"}))
        if place.name in ("open", "write", "fsync", "fcntl", "flock"):
            trials.append(Trial(place, {"error": errno.EINVAL}))
        if place.name == "flock":
            trials.append(Trial(place, {"error": errno.ENOLCK, "times": None}))
        if place.name in ("read", "pread", "write"):
            trials.append(Trial(place, {"action": "short", "argument": 100}))
        if place.name in ("write", "fsync", "rename"):
            trials.append(Trial(place, {"action": "delay", "argument": 30}))
    return trials


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `root`, of the runs, and the faults."""
    directory = tmp_path_factory.mktemp("faults")
    (directory / "root").mkdir()
    return directory


@pytest.fixture(scope="module")
def faults(shared: Path) -> Injection:
    return Injection(shared / "faults", shared / "root")


@dataclass
class Record:
    """Of a clean run."""

    digests: dict[int, str]
    disk: Disk
    """Before the save of step 2."""
    journal: list[Call]
    """From there to the last call of the run, with the saves of steps 2 and 3."""
    places: list[Place]
    """Of the save of step 3: up to the first call of the next."""
    complete: frozenset[Place]
    """Those of them before which the checkpoint is durable: what fails there costs a warning."""


def undisturbed(server: ForkServer, faults: Injection, corpus: Path, shared: Path, steps: int) -> Record:
    """A run of so many steps; its first saves are looked at."""
    root = shared / "root"
    faults.keep("contents")
    faults.arm(*breakpoints(1))
    ranks = Ranks(server, faults, [*tiny(corpus), "training.exit_steps=4"])
    assert wait_for_save(faults, ranks, 1) == 2
    disk = Disk.of(root)
    before = len(faults.journal())
    faults.arm(*breakpoints(2))
    assert wait_for_save(faults, ranks, 2) == 3
    begin = len(faults.journal())
    faults.arm(*breakpoints(3))
    assert wait_for_save(faults, ranks, 3) == 4
    # the first call of the next save is where it is made to wait
    behind = f"{SAVE_DIR}/{directory(4)}"
    calls = faults.journal()[begin:]
    save = [call for call in calls if call.path.startswith(SAVE_DIR) and not call.path.startswith(behind)]
    faults.arm()
    ended = ranks.wait()
    assert ended.codes == [0, 0], ended.output
    journal = faults.journal()[before:]
    faults.keep("no")
    faults.forget()
    write_tree({}, root)
    every = Ranks(server, faults, [*tiny(corpus), f"training.exit_steps={steps}", "checkpoint.keep_last=null"])
    ended = every.wait()
    assert ended.codes == [0, 0], ended.output
    digests = {step: digest(root / SAVE_DIR / directory(step)) for step in range(1, steps + 1)}
    write_tree({}, root)
    found = places(save, 3, 3)
    return Record(digests, disk, journal, found, frozenset(found) - frozenset(places(save[: _durable(save)], 3, 3)))


def _durable(save: Sequence[Call]) -> int:
    """How many calls it takes until the record is in the directory, for good."""
    renamed = next(number for number, call in enumerate(save) if call.other == f"{SAVE_DIR}/{directory(3)}/{RECORD}")
    return next(
        number
        for number, call in enumerate(save, 1)
        if number > renamed and (call.name, call.path) == ("fsync", f"{SAVE_DIR}/{directory(3)}")
    )


@dataclass
class Figures:
    """What came of a row of trials."""

    struck: int = 0
    saved: int = 0
    failed: int = 0
    ended: int = 0
    """Runs that a fault has ended."""
    problems: Problems = field(default_factory=Problems)

    def numbers(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("struck", "saved", "failed", "ended")}


class Disturbed:
    """A run with a fault at every other save; it is started again where one ends it."""

    def __init__(
        self, server: ForkServer, faults: Injection, corpus: Path, record: Record, row: Sequence[Trial]
    ) -> None:
        self.figures = Figures()
        self._server, self._faults, self._record = server, faults, record
        self._arguments = [*tiny(corpus), f"training.exit_steps={max(record.digests)}"]
        self._save_dir = faults.root / SAVE_DIR
        self._left = list(row)
        self._tried: dict[int, Trial] = {}
        self._seen: dict[int, int] = {}
        """Step of a save -> the newest checkpoint behind it."""
        self._said: dict[int, list[str]] = {}
        self._step = 0  # of the save that was let go last

    def run(self) -> Figures:
        while self._left:
            before = len(self._left)
            self._once()
            if len(self._left) == before:
                self._wrong(f"no run reaches the {before} trials that are left")
                break
        self._compare()
        return self.figures

    def _wrong(self, text: str) -> None:
        trial = self._tried.get(self._step, self._tried.get(self._step - 1))
        self.figures.problems.add(f"{trial}: step {self._step}: {text}")

    def _good(self) -> int:
        return max(self._seen.values(), default=0)

    def _once(self) -> None:
        """One start of the two ranks."""
        self._step = self._good()
        self._faults.arm(*breakpoints(self._step))
        ranks = Ranks(self._server, self._faults, self._arguments)
        while (step := wait_for_save(self._faults, ranks, self._step)) is not None:
            if self._step in self._tried and not self._faults.fired(AHEAD):
                self._wrong("was never reached")
                del self._tried[self._step]
            self._faults.arm(*breakpoints(step - 1))  # nothing is left that could strike our own look
            self._look(step - 1)
            self._step = step
            more = []
            if self._left and step > 2 and self._good() == step - 1 and not {step - 1, step} & {*self._tried}:
                trial = self._tried[step] = self._left.pop(0)
                more = [trial.place.fault(step, **trial.how)]
            self._faults.arm(*breakpoints(step), *more)
        self._faults.arm()
        ended = ranks.wait()
        for step, lines in told(ended.outputs[0]).items():
            self._said[step] = lines
        if ended.codes != [0, 0]:
            self.figures.ended += 1
            self._look(self._step)
            told_why = any(line.startswith("illada: error") for line in ended.output.splitlines())
            if not told_why or any(code not in (0, 1, 75) for code in ended.codes):
                self._wrong(f"the run ended with {ended.codes}:\n{ended.output[-2000:]}")

    def _look(self, step: int) -> None:
        """At what is there after the save of `step`."""
        if step == 0:
            return
        try:
            found = newest(self._save_dir)
        except Exception as error:
            self._wrong(f"the checkpoints cannot be read: {error}")
            return
        if found is None:
            self._wrong("no checkpoint is left")
            return
        if found[0] < self._good():
            self._wrong(f"step {self._good()} is lost, the newest is {found[0]}")
        if found[1] != self._record.digests[found[0]]:
            self._wrong(f"the tensors of step {found[0]} are others")
        self._seen[step] = found[0]
        if found[0] == step and step > 1 and step not in self._tried and (left_over := self._left_over(step)):
            self._wrong(f"was saved, and these stayed: {left_over}")

    def _left_over(self, step: int) -> list[str]:
        """What a save that succeeded has to have removed, with keep_last=1. What an attempt that has ended has begun
        behind it stays until it is saved again."""
        names = {path.name for path in self._save_dir.iterdir() if path.is_dir() and path.name < directory(step)}
        names |= {path.name for path in self._save_dir.glob("*.tmp")}
        return sorted(names)

    def _compare(self) -> None:
        """What the run said of its saves with what was there."""
        for step, trial in self._tried.items():
            self._step = step
            self.figures.struck += 1
            lines = self._said.get(step, [])
            if not lines:
                continue  # it has ended the run
            succeeded = lines[-1].startswith("saved")
            self.figures.saved += succeeded
            self.figures.failed += not succeeded
            after = max((seen for at, seen in self._seen.items() if step <= at <= step + 1), default=0)
            if len(lines) != 1:
                self._wrong(f"said {lines}")
            elif succeeded and after < step:
                self._wrong(f"said {lines[0]!r}, but {after} is the newest")
            elif not succeeded and trial.place in self._record.complete:
                self._wrong(f"its record was durable, said {lines[0]!r}")


def _spread(row: Sequence[Trial], count: int) -> list[Trial]:
    """So many of them, from the first to the last."""
    return [row[number * len(row) // count] for number in range(count)]


SAMPLE, CHUNK = 12, 60


@pytest.fixture(scope="module")
def record(server: ForkServer, faults: Injection, corpus: Path, shared: Path) -> Record:
    return undisturbed(server, faults, corpus, shared, 2 * SAMPLE + 6)


def test_power_loss_at_each_call_of_a_save(record: Record, shared: Path) -> None:
    """Whatever is on the disk then: the checkpoint before it, or the one that was saved, to the bit; and the new one
    from the moment in which the run could have said so."""
    copy, acknowledged = shared / "copy", 0
    looked_at: dict[bytes, tuple[int, str] | None] = {}

    def found_in(tree: Tree) -> tuple[int, str] | None:
        tree = {path: content for path, content in tree.items() if path.startswith(f"{SAVE_DIR}/step_")}
        key = tree_digest(tree)
        if key not in looked_at:
            write_tree({SAVE_DIR: None, **tree}, copy)
            looked_at[key] = newest(copy / SAVE_DIR)
        return looked_at[key]

    assert found_in(record.disk.kill()) == (1, record.digests[1])
    for number, disk in replayed(record.disk, record.journal):
        call = record.journal[number - 1] if number else None
        for lost, tree in disk.power_losses():
            found = found_in(tree)
            assert found is not None, f"after {call}: nothing is left ({lost})"
            assert found[0] >= acknowledged, f"after {call}: step {acknowledged} was lost ({lost})"
            assert found[1] == record.digests[found[0]], f"after {call}: the tensors are others ({lost})"
        # a line of the log for each save that has succeeded, from step 1 on
        acknowledged = (disk.kill()["steps.jsonl"] or b"").count(b'"save_seconds"')
    print(f"{len(record.journal)} calls of two saves, {len(looked_at)} states of the disk")
    assert acknowledged >= 2
    assert len(looked_at) > 100


def test_a_sample_of_faults_of_a_save(
    server: ForkServer, faults: Injection, corpus: Path, shared: Path, record: Record
) -> None:
    row = _spread(trials(record.places), SAMPLE)
    figures = Disturbed(server, faults, corpus, record, row).run()
    assert not figures.problems, "\n".join([str(figures.numbers()), *figures.problems])
    assert figures.struck == SAMPLE


@pytest.mark.slow
def test_every_fault_of_a_save(
    server: ForkServer, faults: Injection, corpus: Path, shared: Path, record: Record
) -> None:
    """In runs of some faults each, so that the undisturbed one that they are compared with need not be long."""
    row = trials(record.places)
    longer = undisturbed(server, faults, corpus, shared, 2 * CHUNK + CHUNK // 4 + 20)
    sums, problems = Counter[str](), []
    for begin in range(0, len(row), CHUNK):
        figures = Disturbed(server, faults, corpus, longer, row[begin : begin + CHUNK]).run()
        write_tree({}, shared / "root")
        problems += figures.problems
        sums += Counter(figures.numbers())
        print(dict(sums), len(problems), "problems of", len(row), flush=True)
    assert not problems, "\n".join([str(sums), *problems])

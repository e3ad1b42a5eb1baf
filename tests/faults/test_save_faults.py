"""A fault at each system call of a save of two ranks: no checkpoint is lost, what is said is true, the run goes on.

One run saves at each step and is stopped, before each save, in its first call: the test looks at the directory,
chooses the next fault, and lets it go on. So one start of processes serves for all faults that a run survives. Between
two saves that are disturbed lies one that is not.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults.fork_server import ForkServer
from faults.injection import Call, Injection
from faults.power_loss import Disk, Tree, replayed, tree_digest, write_tree
from faults.training_run import (
    SAVE_DIR,
    Place,
    Ranks,
    breakpoint_at,
    digest,
    directory,
    newest,
    places,
    tiny,
    told,
    wait_for,
)

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
    return Injection(shared / "faults", shared / "root", journal="contents")


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
    ranks = None
    faults.forget()
    faults.arm(breakpoint_at(2))
    ranks = Ranks(server, faults, [*tiny(corpus), "training.exit_steps=4"])
    assert wait_for(faults, ranks)
    disk = Disk.of(root)
    before = len(faults.journal())
    faults.arm(breakpoint_at(3))
    assert wait_for(faults, ranks)
    begin = len(faults.journal())
    faults.arm(breakpoint_at(4))
    assert wait_for(faults, ranks)
    save = faults.journal()[begin:]
    faults.arm()
    ended = ranks.wait()
    assert ended.codes == [0, 0], ended.output
    journal = faults.journal()[before:]
    write_tree({}, root)
    every = Ranks(server, faults, [*tiny(corpus), f"training.exit_steps={steps}", "checkpoint.keep_last=null"])
    ended = every.wait()
    assert ended.codes == [0, 0], ended.output
    digests = {step: digest(root / SAVE_DIR / directory(step)) for step in range(1, steps + 1)}
    write_tree({}, root)
    faults.forget()
    save = [call for call in save if call.path.startswith(SAVE_DIR)]
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

    calls: int = 0
    struck: int = 0
    saved: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.calls} calls of a save, {self.struck} faults: {self.saved} saves succeeded, {self.failed} failed, "
            f"{len(self.problems)} problems"
        )


def disturb(
    server: ForkServer, faults: Injection, corpus: Path, shared: Path, record: Record, row: Sequence[Trial]
) -> Figures:
    """One run with all of `row`."""
    root = shared / "root"
    save_dir = root / SAVE_DIR
    figures = Figures(calls=len({trial.place for trial in row}))
    last = max(record.digests)
    tried: dict[int, Trial] = {}
    seen: dict[int, int] = {}  # step of a save -> the newest checkpoint behind it
    left = list(row)
    faults.arm(breakpoint_at(1))
    ranks = Ranks(server, faults, [*tiny(corpus), f"training.exit_steps={last}"])
    step, good = 0, 0
    while step < last and wait_for(faults, ranks):
        # `step` was saved, disturbed by tried[step]
        if step in tried and not faults.fired(1):
            figures.problems.append(f"{tried.pop(step)}: was never reached")
        faults.arm(breakpoint_at(step + 1))  # none of its faults is left for our own look
        why = tried.get(step, tried.get(step - 1))
        if step:
            try:
                found = newest(save_dir)
            except Exception as error:
                found = None
                figures.problems.append(f"{why}: step {step}: {error}")
            if found is None:
                figures.problems.append(f"{why}: step {step}: no checkpoint is left")
            else:
                if found[0] < good:
                    figures.problems.append(f"{why}: step {step}: step {good} is lost, the newest is {found[0]}")
                if found[1] != record.digests[found[0]]:
                    figures.problems.append(f"{why}: step {step}: the tensors of step {found[0]} are others")
                good = seen[step] = found[0]
            if good == step and step > 1 and (left_over := _left_over(save_dir, step)):
                figures.problems.append(f"{why}: step {step} was saved, and these stayed: {left_over}")
        step += 1
        if left and good == step - 1 and step - 1 not in tried and step > 2:
            tried[step] = left.pop(0)
            faults.arm(breakpoint_at(step + 1), tried[step].place.fault(step, **tried[step].how))
        else:
            faults.arm(breakpoint_at(step + 1))
    faults.arm()
    ended = ranks.wait()
    if ended.codes != [0, 0]:
        figures.problems.append(
            f"{tried.get(step)}: step {step}: the run ended with {ended.codes}:\n{ended.output[-3000:]}"
        )
    assert not left, f"{len(left)} trials were not reached; the last: {tried.get(step)}, {figures.problems}"
    _compare(record, tried, seen, told(ended.outputs[0]), figures)
    return figures


def _left_over(save_dir: Path, step: int) -> list[str]:
    """What a save that succeeded has to have removed, with keep_last=1."""
    paths = [path for path in save_dir.rglob("*") if path.is_dir() or path.suffix == ".tmp"]
    return sorted(str(path.relative_to(save_dir)) for path in paths if path.name != directory(step))


def _compare(
    record: Record, tried: dict[int, Trial], seen: dict[int, int], said: dict[int, list[str]], figures: Figures
) -> None:
    """What the run said of its saves with what was there."""
    for step, trial in tried.items():
        figures.struck += 1
        lines = said.get(step, [])
        if len(lines) != 1:
            figures.problems.append(f"{trial}: step {step}: said {lines}")
            continue
        succeeded = lines[0].startswith("saved")
        figures.saved += succeeded
        figures.failed += not succeeded
        if succeeded and seen.get(step) != step:
            figures.problems.append(f"{trial}: step {step}: said {lines[0]!r}, but {seen.get(step)} is the newest")
        if not succeeded and trial.place in record.complete and "step_[+1]" not in trial.place.path:
            figures.problems.append(f"{trial}: step {step}: its record was durable, said {lines[0]!r}")
        later = said.get(step + 1, [""])[-1]
        if step + 1 in seen and seen[step + 1] != step + 1 and "step_[+1]" not in trial.place.path:
            figures.problems.append(f"{trial}: step {step + 1}, not disturbed, was not saved: {later!r}")


def _spread(row: Sequence[Trial], count: int) -> list[Trial]:
    """So many of them, from the first to the last."""
    return [row[number * len(row) // count] for number in range(count)]


SAMPLE = 20


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
    figures = disturb(server, faults, corpus, shared, record, row)
    assert not figures.problems, "\n".join([str(figures), *figures.problems])
    assert figures.struck == SAMPLE


@pytest.mark.slow
def test_every_fault_of_a_save(
    server: ForkServer, faults: Injection, corpus: Path, shared: Path, record: Record
) -> None:
    row = trials(record.places)
    write_tree({}, shared / "root")
    longer = undisturbed(server, faults, corpus, shared, 2 * len(row) + len(row) // 4 + 20)
    figures = disturb(server, faults, corpus, shared, longer, row)
    print(figures)
    assert not figures.problems, "\n".join([str(figures), *figures.problems])

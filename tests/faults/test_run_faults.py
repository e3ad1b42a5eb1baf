"""A fault at each call of a run of two ranks that goes on from a checkpoint, trains a step, saves and ends: a run each.

Whatever happens, the run ends by itself, with 0 and its last state saved, or with an exit code that lets a launcher
try again and a message; and what was durable before is there, to the bit. It never begins from an older checkpoint, or
anew, because a call has failed.
"""

import errno
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.injection import Injection
from faults.training_run import SAVE_DIR, Ended, Place, Problems, Ranks, digest, directory, newest, places, tiny
from fork_server import ForkServer

# Far above the limits that the run has (below); only so that a run that hangs does not block the others.
LIMIT_SECONDS = 900.0
AT_A_TIME = 4
STEPS = 3
# what else can be set is at its default
ARGUMENTS = ("checkpoint.keep_last=2", "runtime.distributed_timeout_minutes=0.5")
# a save ends within 6 s, and what its end takes to be noticed by all; a rank that does not answer within 30 s is lost
HANGS = ("checkpoint.save_timeout_minutes=0.1",)
_WRITING = ("open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir")


@dataclass
class Prepared:
    """What the disturbed runs begin with."""

    tree: Path
    """Checkpoints of steps 1 and 2."""
    digests: dict[int, str]
    places: list[Place]
    """Of a clean run from step 2 to 3, its log included; paths are relative to step 3."""


@pytest.fixture(scope="module")
def prepared(server: ForkServer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    place = tmp_path_factory.mktemp("prepared")
    faults = _at(place / "clean")
    ended = Ranks(server, faults, [*tiny(corpus), *ARGUMENTS, "training.exit_steps=2"]).wait()
    assert ended.codes == [0, 0], ended.output
    shutil.copytree(faults.root, place / "tree")
    before = len(faults.journal())
    ended = Ranks(server, faults, [*tiny(corpus), *ARGUMENTS, f"training.exit_steps={STEPS}"]).wait()
    assert ended.codes == [0, 0], ended.output
    calls = faults.journal()[before:]
    digests = {2: digest(place / "tree" / SAVE_DIR / directory(2)), 3: digest(faults.root / SAVE_DIR / directory(3))}
    return Prepared(place / "tree", digests, places(calls, STEPS, 2))


def _at(place: Path) -> Injection:
    (place / "root").mkdir(parents=True)
    return Injection(place / "faults", place / "root", journal="calls")


@dataclass(frozen=True)
class Trial:
    """One run with one fault."""

    place: Place
    how: dict[str, object]
    why: Callable[["Trial", Ended, tuple[int, str] | None], str | None]
    """What is wrong about what came of it."""

    def __str__(self) -> str:
        named = {key: errno.errorcode[value] if key == "error" else value for key, value in self.how.items()}  # type: ignore[index]
        return f"{self.place}: {named}"


def errors(found: Sequence[Place]) -> list[Trial]:
    """EIO once and for good wherever the run reads or writes, a full disk where it writes."""
    trials = []
    for place in found:
        if place.nth == 1 or place.name in _WRITING:
            trials += [Trial(place, {"error": errno.EIO, "times": times}, _error) for times in (1, None)]
        if place.name in ("open", "write", "mkdir", "fsync") and "[+0]" in place.path:
            trials.append(Trial(place, {"error": errno.ENOSPC, "times": None}, _error))
        if place.name == "pread":
            trials.append(Trial(place, {"action": "short", "argument": 7}, _error))
            trials.append(Trial(place, {"error": errno.ESTALE, "times": None}, _error))
    return trials


def ends(found: Sequence[Place]) -> list[Trial]:
    """A rank that is killed, at each call of a save."""
    return [Trial(place, {"action": "kill"}, _killed) for place in _of_save(found)]


def hangs(found: Sequence[Place]) -> list[Trial]:
    """A call that does not return; at some, a file system that is frozen from there on, or a stopped process."""
    trials = []
    for place in _of_save(found):
        actions = ["hang", *(["freeze"] if place.name == "open" else []), *(["stop"] if place.name == "fsync" else [])]
        trials += [Trial(place, {"action": action}, _hung) for action in actions if place.nth == 1]
    return trials


def _of_save(found: Sequence[Place]) -> list[Place]:
    return [place for place in found if place.name in _WRITING and ("[+0]" in place.path or "latest" in place.path)]


def _error(trial: Trial, ended: Ended, left: tuple[int, str] | None) -> str | None:
    if ended.codes == [0, 0]:
        return None if left is not None and left[0] == STEPS else f"ended with 0, the newest checkpoint is {left}"
    if any(code not in (0, 1, 75) for code in ended.codes):
        return f"ended with {ended.codes}, expected 0, 1 or 75: a launcher does not try again"
    told = [line for output in ended.outputs for line in output.splitlines() if line.startswith("illada: error")]
    if not told:
        return f"ended with {ended.codes} and no message"
    return None


def _killed(trial: Trial, ended: Ended, left: tuple[int, str] | None) -> str | None:
    victim = trial.place.rank or 0
    if ended.codes[victim] != -signal.SIGKILL:
        return f"ended with {ended.codes}"
    return None if ended.codes[1 - victim] in (0, 1, 75) else f"the other rank ended with {ended.codes[1 - victim]}"


def _hung(trial: Trial, ended: Ended, left: tuple[int, str] | None) -> str | None:
    stopped = trial.place.rank if trial.how["action"] == "stop" else None
    codes = [code for rank, code in enumerate(ended.codes) if rank != stopped]
    return None if all(code in (0, 1, 75) for code in codes) else f"ended with {ended.codes}"


@dataclass
class _Running:
    trial: Trial
    faults: Injection
    ranks: Ranks
    place: Path
    begin: float


def run_all(
    server: ForkServer, corpus: Path, prepared: Prepared, trials: Sequence[Trial], place: Path, more: Sequence[str] = ()
) -> list[str]:
    """One run for each trial, a few at a time. Returns what was wrong, and prints figures."""
    left, running, problems, struck = list(trials), list[_Running](), Problems(), 0
    longest, ended_with = 0.0, dict[str, int]()
    while left or running:
        while left and len(running) < AT_A_TIME:
            trial = left.pop(0)
            where = place / f"{len(trials) - len(left)}"
            faults = _at(where)
            shutil.copytree(prepared.tree, faults.root, dirs_exist_ok=True)
            faults.arm(trial.place.fault(STEPS, **trial.how))
            arguments = [*tiny(corpus), *ARGUMENTS, f"training.exit_steps={STEPS}", *more]
            running.append(_Running(trial, faults, Ranks(server, faults, arguments), where, time.monotonic()))
        for one in list(running):
            late = time.monotonic() > one.begin + LIMIT_SECONDS
            if not (one.ranks.ended() or late or _only_stopped(one)):
                continue
            ended = one.ranks.wait(0)
            running.remove(one)
            longest = max(longest, time.monotonic() - one.begin)
            ended_with[str(ended.codes)] = ended_with.get(str(ended.codes), 0) + 1
            struck += one.faults.fired() > 0
            for problem in _wrong(one, ended, prepared):
                problems.add(f"{one.trial}: {problem}")
            shutil.rmtree(one.place)
        time.sleep(0.02)
    print(
        f"{len({trial.place for trial in trials})} calls, {len(trials)} runs, {struck} faults struck, exit codes "
        f"{ended_with}, the longest run {longest:.0f} s, {len(problems)} problems"
    )
    return problems


def _only_stopped(one: _Running) -> bool:
    """The stopped rank is all that is left."""
    return one.trial.how.get("action") == "stop" and one.ranks.ended(except_for=one.trial.place.rank)


def _wrong(one: _Running, ended: Ended, prepared: Prepared) -> Iterator[str]:
    try:
        left = newest(one.faults.root / SAVE_DIR)
    except Exception as error:
        yield f"ended with {ended.codes}; what is left cannot be read: {error}\n{_end_of(ended)}"
        return
    if left is None or left[0] < 2:
        yield f"ended with {ended.codes}; step 2 is lost, left is {left}\n{_end_of(ended)}"
    elif left[1] != prepared.digests[left[0]]:
        yield f"ended with {ended.codes}; the tensors of step {left[0]} are others\n{_end_of(ended)}"
    if (began := re.search(r"continues from \S*step_(\d+)", ended.output)) is None:
        if ended.codes == [0, 0]:
            yield f"began anew\n{_end_of(ended)}"
    elif int(began[1]) != 2:
        yield f"went back to step {int(began[1])}\n{_end_of(ended)}"
    if one.faults.fired() and (why := one.trial.why(one.trial, ended, left)) is not None:
        yield f"{why}\n{_end_of(ended)}"


def _end_of(ended: Ended) -> str:
    return "\n".join(f"    rank {rank}| " + output.strip()[-400:] for rank, output in enumerate(ended.outputs))


def _spread(row: Sequence[Trial], count: int) -> list[Trial]:
    """So many of them, from the first to the last."""
    count = min(count, len(row))
    return [row[number * len(row) // count] for number in range(count)]


def test_a_sample_of_errors(server: ForkServer, corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    problems = run_all(server, corpus, prepared, _spread(errors(prepared.places), 4), tmp_path)
    assert not problems, "\n".join(problems)


def test_a_sample_of_kills(server: ForkServer, corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    problems = run_all(server, corpus, prepared, _spread(ends(prepared.places), 2), tmp_path)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_every_error(server: ForkServer, corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    problems = run_all(server, corpus, prepared, errors(prepared.places), tmp_path)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_every_kill(server: ForkServer, corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    problems = run_all(server, corpus, prepared, ends(prepared.places), tmp_path)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_every_hang(server: ForkServer, corpus: Path, prepared: Prepared, tmp_path: Path) -> None:
    problems = run_all(server, corpus, prepared, hangs(prepared.places), tmp_path, HANGS)
    assert not problems, "\n".join(problems)

"""Fifty kills at random moments: of ranks while they start, step and save, of resharding while it reads and writes.

Each time the rest of the run ends or starts again by itself, no good checkpoint is lost, and in the end every step has
the loss of a run that nobody disturbed, to the last bit. Takes a quarter of an hour on two cores. By hand, with other
moments: `ILLADA_KILL_SEED=7 python -m pytest -m slow -s tests/training/test_random_kills.py`.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from launch import ROOT, launch, rank_processes, read_steps

from illada_megatron.checkpoint.files.integrity import damage
from illada_megatron.checkpoint.store import newest_complete

pytestmark = pytest.mark.slow

KILLS_OF_RANKS, KILLS_OF_RESHARDING = 40, 10
STEPS, MORE_STEPS = 300, 320
RANKS = 4
LAYOUT = ("parallel.tensor_model_parallel_size=2", "validation.interval_steps=null")


class Killer:
    """Kills ranks of a launcher, each in a life of its own."""

    def __init__(self, chance: random.Random, save_dir: Path, jsonl: Path) -> None:
        self.chance, self.save_dir, self.jsonl = chance, save_dir, jsonl
        self.moments: Counter[str] = Counter()
        self.saved = 0

    def __call__(self, launcher: psutil.Process) -> None:
        """Returns when all kills are done, and leaves the run alone."""
        killed: set[int] = set()
        for _ in range(KILLS_OF_RANKS):
            ranks = self._new_ranks(launcher, killed)
            moment = self.chance.choice(["start", "step", "step", "save", "save"])
            self._wait(moment, launcher)
            victim = self.chance.choice(ranks)
            victim.kill()
            killed |= {rank.pid for rank in ranks}
            self.moments[moment] += 1
            self._nothing_lost()

    def _new_ranks(self, launcher: psutil.Process, killed: set[int]) -> list[psutil.Process]:
        """Those of the next life, all of them."""
        while True:
            assert launcher.status() != psutil.STATUS_ZOMBIE, "the run ended before all kills were done"
            ranks = [rank for rank in _ranks(launcher) if rank.pid not in killed]
            if len(ranks) == RANKS:
                return ranks
            time.sleep(0.01)

    def _wait(self, moment: str, launcher: psutil.Process) -> None:
        if moment == "start":
            time.sleep(self.chance.uniform(0, 10))
            return
        done = max((step["step"] for step in read_steps(self.jsonl)), default=0)
        wanted = done + self.chance.randint(1, 5)
        before = set(self.save_dir.glob("step_*"))
        while launcher.status() != psutil.STATUS_ZOMBIE:
            if moment == "save" and set(self.save_dir.glob("step_*")) - before:
                time.sleep(self.chance.uniform(0, 0.05))
                return
            if moment == "step" and any(step["step"] >= wanted for step in read_steps(self.jsonl)):
                time.sleep(self.chance.uniform(0, 0.5))
                return
            if not _ranks(launcher):
                return
            time.sleep(0.001)

    def _nothing_lost(self) -> None:
        """The newest good checkpoint is never older than it was; another may be complete a moment later."""
        if not self.save_dir.exists():
            assert not self.saved
            return
        info, _ = newest_complete(self.save_dir)
        step = info.step if info is not None else 0
        assert step >= self.saved
        self.saved = step


def _ranks(launcher: psutil.Process) -> list[psutil.Process]:
    try:
        return rank_processes(launcher)
    except psutil.Error:  # one ended while it was looked at
        return []


def test_random_kills(small: tuple[str, ...], tmp_path: Path) -> None:
    seed = int(os.environ.get("ILLADA_KILL_SEED", "1"))
    chance = random.Random(seed)
    save_dir, jsonl = tmp_path / "checkpoints", tmp_path / "steps.jsonl"
    common = [*small, *LAYOUT, "checkpoint.interval_steps=2"]
    saving = [f"checkpoint.save_dir={save_dir}", "checkpoint.keep_last=2"]
    killer = Killer(chance, save_dir, jsonl)
    begin = time.monotonic()
    run = launch(
        "train",
        [
            *common,
            *saving,
            f"training.train_steps={MORE_STEPS}",
            f"training.exit_steps={STEPS}",
            "--max-restarts",
            "99",
        ],
        RANKS,
        jsonl,
        killer,
    )
    assert run.process.returncode == 0, run.output
    assert sum(killer.moments.values()) == KILLS_OF_RANKS
    middle = time.monotonic()

    resharded, kills = _reshard_under_fire(chance, save_dir, tmp_path)
    saving = [f"checkpoint.save_dir={resharded}", f"training.train_steps={MORE_STEPS}"]
    # a run with another save_dir is another run: it is refused the log of the first
    last = launch("train", [*common, *saving], RANKS, tmp_path / "resharded.jsonl")
    assert last.process.returncode == 0, last.output
    assert f"step_{STEPS:08d}: step {STEPS}" in last.process.stdout.replace("\n", "")

    undisturbed = launch(
        "train", [*common, f"training.train_steps={MORE_STEPS}"], RANKS, tmp_path / "undisturbed.jsonl"
    )
    steps = [*read_steps(jsonl), *last.steps]
    assert [step["step"] for step in steps] == list(range(1, MORE_STEPS + 1))
    for name in ("loss", "grad_norm", "masked_cross_entropy", "consumed_samples", "lr"):
        assert [step[name] for step in steps] == [step[name] for step in undisturbed.steps], name
    print(
        f"\nseed {seed}: {dict(killer.moments)} kills of ranks in {middle - begin:.0f} s, {kills} kills of resharding, "
        f"then {MORE_STEPS} losses as without them"
    )


def _reshard_under_fire(chance: random.Random, save_dir: Path, tmp_path: Path) -> tuple[Path, int]:
    """A checkpoint resharded by a process that was killed again and again before it got there."""
    info, _ = newest_complete(save_dir)
    assert info is not None
    target = tmp_path / "resharded" / "checkpoints"
    target.parent.mkdir()
    line = [sys.executable, "-m", "illada_megatron", "checkpoint", "reshard", str(info.path), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    line += ["--tp", "2", "--dp", "2"]
    subprocess.run([*line[:6], str(tmp_path / "undisturbed"), *line[7:]], env=environment, check=True)
    seconds, kills = time.monotonic() - begin, 0
    while kills < KILLS_OF_RESHARDING:
        process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0, seconds))
        victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        chance.choice(victims).kill()
        process.wait()
        kills += 1
        assert damage(info.path, info.files, checksums=True) is None  # the source is as it was
        if target.exists():  # whole, or not there
            found, _ = newest_complete(target)
            assert found is not None
            assert damage(found.path, found.files, checksums=True) is None
            for path in sorted(target.parent.iterdir()):
                subprocess.run(["rm", "-r", str(path)], check=True)
    subprocess.run(line, env=environment, check=True)
    return target, kills

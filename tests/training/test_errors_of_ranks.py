"""An error of one rank is that rank's to tell: what the others meet is only that it has gone."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence

from launch import ROOT, launch

from illada_megatron.runtime.loopback import quiet_port


def _two_ranks(*arguments: Sequence[str]) -> list[tuple[int, str]]:
    """(exit code, stderr) of two ranks, each with its own arguments: as two machines with other files would be."""
    port = quiet_port()
    ranks = []
    for rank, own in enumerate(arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        line = [sys.executable, "-m", "illada_megatron", "train", *own]
        ranks.append(
            subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
        )
    return [(rank.wait(), said) for rank, said in [(rank, rank.communicate()[1]) for rank in ranks]]


def test_a_configuration_that_is_wrong_on_one_machine(tiny_run: tuple[str, ...]) -> None:
    """Rank 1's file says that its corpus may be read a hundredth of a time. It says so itself, and exits with 2; the
    other one's connections end, which may pass: 1."""
    (code, said), (own_code, own) = _two_ranks(tiny_run, [*tiny_run, "data.max_epochs=1e-9"])
    assert own_code == 2
    assert re.search(r"illada: error \(rank 1 on \S+\): .*max_epochs", own), own
    assert code == 1, said
    assert "max_epochs" not in said


def test_before_they_have_met(tiny_run: tuple[str, ...]) -> None:
    """A field that does not exist is found when the file is read."""
    ranks = _two_ranks([*tiny_run, "training.nonsense=1"], [*tiny_run, "training.nonsense=1"])
    for rank, (code, said) in enumerate(ranks):
        assert code == 2
        assert f"illada: error (rank {rank} on" in said


def test_what_all_have_agreed_on_is_said_once(tiny_run: tuple[str, ...]) -> None:
    run = launch("train", [*tiny_run, "training.lr=1e30", "training.train_steps=9", "faults.max_bad_steps=2"], 2)
    assert run.process.returncode == 3, run.output
    assert run.process.stderr.count("illada: error") == 1
    assert "2 bad steps in a row" in run.process.stderr

"""Numbers of machines that do not divide the batch: the run goes on with all that are left, or some wait as spares."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from launch import ROOT, launch, read_steps
from network import wait_for, wait_until
from test_layouts import RELATIVE, assert_same_training

from illada_megatron.runtime.loopback import quiet_port


@dataclass
class _Cluster:
    """Launchers of one rank each: to the run they are machines. The first holds the rendezvous."""

    directory: Path
    nnodes: str
    training: list[str]
    machines: list[subprocess.Popen[str]] = field(default_factory=list)
    port: int = 0

    def start(self) -> None:
        if not self.machines:
            self.port = quiet_port()
        number = len(self.machines)
        line = [sys.executable, "-m", "illada_megatron", "train", "--nnodes", self.nnodes, "--max-restarts", "9"]
        line += ["--rdzv-endpoint", f"127.0.0.1:{self.port}", "--local-addr", "127.0.0.1"]
        line += ["--rdzv-conf", f"last_call_timeout=5,is_host={int(number == 0)}", *self.training]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log(number).open("w") as log:
            self.machines.append(subprocess.Popen(line, stdout=log, stderr=log, text=True, env=environment))

    def log(self, number: int) -> Path:
        return self.directory / f"machine_{number}.log"

    def worlds(self) -> list[int]:
        """The numbers of ranks in the tables that all starts of the run have shown."""
        text = "".join(self.log(number).read_text() for number in range(len(self.machines)))
        return [int(number) for number in re.findall(r"world size +│ (\d+)", text)]

    def lose_one(self) -> None:
        """A machine that works is gone from one moment to the next, with its rank; not the first."""
        for machine in self.machines[1:]:
            if machine.poll() is None and psutil.Process(machine.pid).children():
                machine.kill()
                machine.wait()
                return
        raise AssertionError("no machine works")


Start = Callable[..., _Cluster]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Start]:
    made: list[_Cluster] = []

    def start(size: int, nnodes: str, *training: str) -> _Cluster:
        made.append(_Cluster(tmp_path, nnodes, list(training)))
        for _ in range(size):
            made[0].start()
        return made[0]

    yield start
    for machine in made[0].machines:
        if machine.poll() is None:
            machine.kill()
            machine.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "worlds"),
    [
        # 5: as quick as 4, which have no empty places; 3 fill 8 of 9
        pytest.param(8, [4, 4, 3, 4], id="the fifth is a spare machine"),
        # 2 would have no empty places either, but take longer than 4 that fill 10 of 12
        pytest.param(10, [5, 4, 3, 4], id="all work"),
    ],
)
def test_five_then_four_then_three_then_four(
    batch: int, worlds: list[int], small: tuple[str, ...], cluster: Start, tmp_path: Path
) -> None:
    """Every step stands once in the log, with the loss, the gradient norm and the counts of one undisturbed process."""
    training = [*small, f"training.global_batch_size={batch}", "training.train_steps=100000", "training.lr=2e-3"]
    training += ["checkpoint.interval_steps=3", "validation.interval_steps=100000"]
    jsonl = tmp_path / "steps.jsonl"
    places = [f"checkpoint.save_dir={tmp_path / 'save'}", f"logging.jsonl_path={jsonl}"]
    run = cluster(5, "2:5", *training, *places)

    def steps_after_start(starts: int, steps: int) -> None:
        def ended() -> None:
            assert run.machines[0].poll() is None, run.log(0).read_text()

        def last() -> int:
            ended()
            return max((one["step"] for one in read_steps(jsonl)), default=0)

        def started() -> bool:
            ended()
            return len(run.worlds()) >= starts

        wait_until(started, f"start {starts}")
        before = last()
        wait_until(lambda: last() >= before + steps, f"{steps} steps after start {starts}")

    for starts in range(1, 4):
        steps_after_start(starts, 4)
        if starts < 3:
            run.lose_one()
    run.start()
    steps_after_start(4, 4)
    left = [number for number, machine in enumerate(run.machines) if machine.poll() is None]
    assert len(left) == 4
    for number in left:
        run.machines[number].send_signal(signal.SIGTERM)
    for number in left:
        assert wait_for(run.machines[number], run.log(number)) == 0, run.log(number).read_text()
    assert sorted(run.worlds()) == sorted(worlds)

    steps = read_steps(jsonl)
    undisturbed = launch(
        "train", [*training, f"training.exit_steps={len(steps)}"], jsonl=tmp_path / "undisturbed.jsonl"
    )
    assert undisturbed.process.returncode == 0, undisturbed.output
    assert_same_training(steps, undisturbed.steps, RELATIVE)


def test_a_spare_machine_leaves_with_the_others(tiny_run: tuple[str, ...], cluster: Start) -> None:
    """Three machines for two places of the batch: one starts no rank, and ends when the run does."""
    run = cluster(3, "2:3", *tiny_run)
    for number, machine in enumerate(run.machines):
        assert wait_for(machine, run.log(number)) == 0, run.log(number).read_text()
    logs = [run.log(number).read_text() for number in range(3)]
    assert sum("this machine waits as a spare one: of 3 machines 2 work" in log for log in logs) == 1
    assert run.worlds() == [2]


def test_bad_steps_end_the_run_on_all_machines(tiny_run: tuple[str, ...], cluster: Start) -> None:
    """A spare machine would only do the same steps once more, and the next one after it."""
    run = cluster(3, "1:3", *tiny_run, "training.lr=1e30", "training.train_steps=9", "faults.max_bad_steps=2")
    codes = [wait_for(machine, run.log(number)) for number, machine in enumerate(run.machines)]
    assert sorted(codes) == [0, 3, 3], [run.log(number).read_text() for number in range(3)]
    assert run.worlds() == [2]


@pytest.mark.slow
def test_a_spare_machine_may_be_told_to_stop(tiny_run: tuple[str, ...], cluster: Start, tmp_path: Path) -> None:
    """It leaves with the signal's status; the others do not notice."""
    jsonl = tmp_path / "steps.jsonl"
    run = cluster(3, "2:3", *tiny_run, "training.train_steps=200", f"logging.jsonl_path={jsonl}")
    wait_until(lambda: bool(read_steps(jsonl)), "step 1")
    (spare,) = (n for n in range(3) if "waits as a spare" in run.log(n).read_text())
    if spare == 0:
        pytest.skip("the spare machine holds the rendezvous: its end would be the run's")
    run.machines[spare].send_signal(signal.SIGTERM)
    assert wait_for(run.machines[spare], run.log(spare)) in (0, 128 + signal.SIGTERM)
    for number in {0, 1, 2} - {spare}:
        assert wait_for(run.machines[number], run.log(number)) == 0, run.log(number).read_text()
    assert run.worlds() == [2]
    assert [step["step"] for step in read_steps(jsonl)] == list(range(1, 201))


@pytest.mark.slow
def test_a_machine_that_could_only_be_a_spare_disturbs_nobody(
    small: tuple[str, ...], cluster: Start, tmp_path: Path
) -> None:
    """One that comes and goes would make all save and start again each time. It is taken in when another is lost."""
    jsonl = tmp_path / "steps.jsonl"
    training = [*small, "training.train_steps=100000", f"logging.jsonl_path={jsonl}", "training.global_batch_size=4"]
    training += [f"checkpoint.save_dir={tmp_path / 'save'}", "checkpoint.interval_steps=3"]
    run = cluster(2, "2:3", *training, "training.micro_batch_size=2")

    def steps(more: int) -> None:
        before = max((one["step"] for one in read_steps(jsonl)), default=0)
        wait_until(lambda: max((one["step"] for one in read_steps(jsonl)), default=0) >= before + more, "more steps")

    steps(3)
    run.start()
    waiting = psutil.Process(run.machines[2].pid)
    wait_until(lambda: len(waiting.net_connections()) > 0, "the third has reached the rendezvous")
    steps(30)
    assert run.worlds() == [2]
    run.lose_one()
    wait_until(lambda: len(run.worlds()) == 2, "the third works")
    steps(3)
    assert run.worlds() == [2, 2]
    for number in (0, 2):
        run.machines[number].send_signal(signal.SIGTERM)
    for number in (0, 2):
        assert wait_for(run.machines[number], run.log(number)) == 0, run.log(number).read_text()


@pytest.mark.slow
def test_a_machine_without_its_data_does_not_end_the_run(
    small: tuple[str, ...], cluster: Start, tmp_path: Path
) -> None:
    """It joins, finds its corpus missing, says so and leaves; the others go on without it."""
    jsonl, corpus = tmp_path / "steps.jsonl", tmp_path / "corpus"
    training = [*small, "training.train_steps=100000", f"logging.jsonl_path={jsonl}"]
    training += [f"checkpoint.save_dir={tmp_path / 'save'}", "checkpoint.interval_steps=3"]
    run = cluster(1, "1:2", *training)

    def last() -> int:
        assert run.machines[0].poll() is None, run.log(0).read_text()
        return max((one["step"] for one in read_steps(jsonl)), default=0)

    wait_until(lambda: last() >= 3, "step 3")
    run.training.append(f"data.train_paths=[{corpus}]")
    run.start()
    assert wait_for(run.machines[1], run.log(1)) == 2
    assert f"{corpus}" in run.log(1).read_text()
    wait_until(lambda: 2 in run.worlds() or "start again" in run.log(0).read_text(), "both have met")
    before = last()
    wait_until(lambda: last() >= before + 3, "the first goes on")
    run.machines[0].send_signal(signal.SIGTERM)
    assert wait_for(run.machines[0], run.log(0)) == 0, run.log(0).read_text()

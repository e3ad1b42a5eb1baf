"""Several machines, one of which is lost in the middle: the run goes on with the others, and takes it in again."""

import re
import subprocess
from pathlib import Path

import network
import pytest
from launch import launch, read_steps
from network import Machine, cluster, wait_for, wait_until
from test_layouts import RELATIVE, assert_same_training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(network.missing() is not None, reason=f"no network namespaces: {network.missing()}"),
]
STEPS = 60
# 16 or 24 micro-batches a rank: steps long enough to pull a cable between two of them
TRAINING = (
    *("training.global_batch_size=48", f"training.train_steps={STEPS}", "training.lr=2e-3"),
    *("checkpoint.interval_steps=5", "validation.interval_steps=1000"),
)
TIMEOUT_SECONDS = 30
TIMEOUT = f"runtime.distributed_timeout_minutes={TIMEOUT_SECONDS / 60}"
SETTINGS = "last_call_timeout=5"


@pytest.fixture(scope="module")
def undisturbed(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The steps of one process that nothing happens to."""
    jsonl = tmp_path_factory.mktemp("undisturbed") / "steps.jsonl"
    run = launch("train", [*small, *TRAINING], jsonl=jsonl)
    assert run.process.returncode == 0, run.output
    return run.steps


def _logged(jsonl: Path) -> int:
    """The last step in the log."""
    return max((record["step"] for record in read_steps(jsonl)), default=0)


def _worlds(directory: Path) -> list[int]:
    """The numbers of ranks in the tables that all starts of the run have shown."""
    text = "".join(path.read_text() for path in sorted(directory.glob("*.log")))
    return [int(number) for number in re.findall(r"world size +│ (\d+)", text)]


def _tell(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n  {text}")


def test_first_of_three_machines_is_lost_and_comes_back(
    small: tuple[str, ...], undisturbed: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three data-parallel machines; the one with rank 0 is cut off, but not the one that holds the rendezvous. The
    other two wait no longer than the timeout, go on from the last checkpoint, and are three again when it is started
    again: they save first, so that no step is lost then. Every step stands once in the log, with the numbers of an
    undisturbed run."""
    jsonl = tmp_path / "steps.jsonl"
    training = [*small, *TRAINING, TIMEOUT, f"checkpoint.save_dir={tmp_path / 'save'}", f"logging.jsonl_path={jsonl}"]

    with cluster(3) as machines:
        lost, host, third = machines

        def start(machine: Machine) -> subprocess.Popen[str]:
            line = ["-m", "illada_megatron", "train", "--nnodes", "2:3", "--rdzv-endpoint", f"{host.address}:29400"]
            line += ["--rdzv-conf", f"{SETTINGS},is_host={int(machine is host)}", "--local-addr", machine.address]
            return machine.start([*line, "--max-restarts", "3", *training], tmp_path / f"{machine.name}.log")

        first = start(lost)
        others = [start(machine) for machine in (host, third)]
        wait_until(lambda: _logged(jsonl) >= 7, "step 7")
        lost.pull_the_cable()
        at_the_cut = _logged(jsonl)
        log = tmp_path / f"{host.name}.log"
        restarted = wait_until(lambda: "restart 1 of 3" in log.read_text(), "the others notice")
        resumed = restarted + wait_until(lambda: _logged(jsonl) > at_the_cut, "the next new step")
        _tell(capsys, f"cut at step {at_the_cut}: noticed after {restarted:.0f} s, next new step after {resumed:.0f} s")
        assert restarted < TIMEOUT_SECONDS + 30

        assert wait_for(first, tmp_path / f"{lost.name}.log") != 0  # nothing of it trains on
        lost.plug_in()
        before = _logged(jsonl)
        assert before < STEPS - 5, "too few steps are left to come back"
        again = start(lost)
        joined = wait_until(lambda: len(_worlds(tmp_path)) == 3, "three machines again")
        _tell(capsys, f"back at step {before}: part of the run after {joined:.0f} s, at step {_logged(jsonl)}")
        for process in (again, *others):
            assert wait_for(process, log) == 0, log.read_text()

    assert sorted(_worlds(tmp_path)) == [2, 3, 3]
    assert_same_training(read_steps(jsonl), undisturbed, RELATIVE)


@pytest.mark.parametrize(
    ("nnodes", "micro_batch_size"),
    [
        pytest.param("2", 1, id="beyond the maximum"),
        # two micro-batches: a third machine has nothing to do, and nobody starts again for it
        pytest.param("2:3", 24, id="beyond what the batch divides"),
    ],
)
def test_a_spare_machine_takes_the_place_of_a_lost_one(
    nnodes: str,
    micro_batch_size: int,
    small: tuple[str, ...],
    undisturbed: list[dict],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three machines for a run of two: the third waits, sees from the heartbeats that one is gone, and joins, long
    before the timeout of the collectives (10 minutes here)."""
    jsonl = tmp_path / "steps.jsonl"
    training = [*small, *TRAINING, f"training.micro_batch_size={micro_batch_size}"]
    training += [f"checkpoint.save_dir={tmp_path / 'save'}", f"logging.jsonl_path={jsonl}"]

    with cluster(3) as (lost, host, spare):

        def start(machine: Machine) -> subprocess.Popen[str]:
            line = ["-m", "illada_megatron", "train", "--nnodes", nnodes, "--rdzv-endpoint", f"{host.address}:29400"]
            line += ["--rdzv-conf", f"is_host={int(machine is host)}", "--local-addr", machine.address]
            return machine.start([*line, "--max-restarts", "3", *training], tmp_path / f"{machine.address}.log")

        processes = {machine.address: start(machine) for machine in (lost, host)}
        wait_until(lambda: _logged(jsonl) >= 1, "step 1")
        processes[spare.address] = start(spare)
        wait_until(lambda: _logged(jsonl) >= 12, "step 12")
        lost.pull_the_cable()
        at_the_cut = _logged(jsonl)
        resumed = wait_until(lambda: _logged(jsonl) > at_the_cut, "the next new step")
        _tell(capsys, f"cut at step {at_the_cut}: next new step, with the spare machine, after {resumed:.0f} s")
        assert resumed < 300
        for machine in (host, spare):
            log = tmp_path / f"{machine.address}.log"
            assert wait_for(processes[machine.address], log) == 0, log.read_text()
    assert _worlds(tmp_path) == [2, 2]
    assert_same_training(read_steps(jsonl), undisturbed, RELATIVE)


def test_one_of_two_machines_is_lost_and_the_layout_changes(
    small: tuple[str, ...], undisturbed: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model cut in two by tensor parallelism over two machines, started with torchrun as it is: where one machine is
    left, the second of the allowed layouts is taken, and the checkpoint is read under it."""
    jsonl = tmp_path / "steps.jsonl"
    layouts = "parallel.layouts=[{tensor_model_parallel_size: 2, sequence_parallel: true}, {micro_batch_size: 2}]"
    training = [*small, *TRAINING, TIMEOUT, layouts]
    training += [f"checkpoint.save_dir={tmp_path / 'save'}", f"logging.jsonl_path={jsonl}"]
    with cluster(2) as (host, lost):
        processes = []
        for machine in (host, lost):
            line = ["-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
            line += ["--rdzv-endpoint", f"{host.address}:29400", "--local-addr", machine.address]
            line += ["--rdzv-conf", f"{SETTINGS},is_host={int(machine is host)}", "--max-restarts", "3"]
            line += ["-m", "illada_megatron", "train", *training]
            processes.append(machine.start(line, tmp_path / f"{machine.address}.log"))
        wait_until(lambda: _logged(jsonl) >= 7, "step 7")
        lost.pull_the_cable()
        at_the_cut = _logged(jsonl)
        resumed = wait_until(lambda: _logged(jsonl) > at_the_cut, "the next new step")
        _tell(capsys, f"cut at step {at_the_cut}: next new step after {resumed:.0f} s")
        log = tmp_path / f"{host.address}.log"
        assert wait_for(processes[0], log) == 0, log.read_text()
        assert wait_for(processes[1], tmp_path / f"{lost.address}.log") != 0
    said = re.sub(r"[\s│]+", " ", log.read_text())
    assert "parallel.layouts[0] of 2, the first that fits" in said
    assert (
        "parallel.layouts[1] of 2, the first that fits not parallel.layouts[0]: world size 1 is not a multiple" in said
    )
    assert_same_training(read_steps(jsonl), undisturbed, RELATIVE)

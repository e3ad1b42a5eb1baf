"""Ranks that srun starts: Slurm's variables in torch's names. They are those of srun's manual; no Slurm runs here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import HANG_SECONDS, ROOT, read_steps

from illada_megatron.runtime.loopback import quiet_port
from illada_megatron.runtime.slurm import first_host, rank_variables

TASK = {
    "SLURM_JOB_ID": "31415926",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu-[007-008,112]",
    "SLURM_NTASKS": "20",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


def test_a_task_of_a_step_is_a_rank() -> None:
    assert rank_variables(TASK) == {
        "RANK": "11",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu-007",
        "MASTER_PORT": str(10000 + (31415926 + 2) % 20000),
    }
    last = rank_variables({**TASK, "SLURM_NODEID": "2", "SLURM_PROCID": "19"})
    assert last["LOCAL_WORLD_SIZE"] == "4"
    first = rank_variables({**TASK, "SLURM_NODEID": "0", "SLURM_PROCID": "0"})
    assert [first[name] for name in ("MASTER_ADDR", "MASTER_PORT")] == [
        last[name] for name in ("MASTER_ADDR", "MASTER_PORT")
    ]


def test_the_users_address_and_port_are_kept() -> None:
    found = rank_variables({**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_a_task_that_sees_only_its_own_gpu() -> None:
    """--gpus-per-task: the GPU of local rank 3 is number 0 there. Several visible ones: its own number."""
    assert rank_variables({**TASK, "CUDA_VISIBLE_DEVICES": "0"})["LOCAL_RANK"] == "0"
    assert rank_variables({**TASK, "CUDA_VISIBLE_DEVICES": "0,1,2,3"})["LOCAL_RANK"] == "3"


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty bash`: a shell
        {"SLURM_STEP_NUM_TASKS": None},  # a batch script has SLURM_PROCID and SLURM_NTASKS too
        {"RANK": "5"},  # torchrun inside a step
    ],
)
def test_what_is_not_a_rank(changes: dict[str, str | None]) -> None:
    merged = {**TASK, **changes}
    assert rank_variables({name: value for name, value in merged.items() if value is not None}) == {}


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("login2", "login2"),
        ("a1,a2", "a1"),
        ("gpu[01-64]", "gpu01"),
        ("gpu[3,5-9]", "gpu3"),
        ("rack[1-2]-node[07-12],x", "rack1-node07"),
        ("n[1-2].cluster.example,m[1-9]", "n1.cluster.example"),
    ],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_counts_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"SLURM_STEP_TASKS_PER_NODE '8x2'"):
        rank_variables({**TASK, "SLURM_STEP_TASKS_PER_NODE": "8x2"})


def test_two_tasks_train_together(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """Two processes with what srun sets, and nothing else: one run on two ranks."""
    port = quiet_port()
    jsonl = tmp_path / "steps.jsonl"
    tasks = []
    for rank in range(2):
        task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1"}
        task |= {"SLURM_NODEID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        task |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
        line = [sys.executable, "-m", "illada_megatron", "train", *tiny_run, f"logging.jsonl_path={jsonl}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **task}
        tasks.append(
            subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [task.communicate(timeout=HANG_SECONDS)[0] for task in tasks]
    finally:
        for one in tasks:
            one.kill()
    assert [one.returncode for one in tasks] == [0, 0], said
    assert "data 2" in said[0]
    assert said[1].count("step ") == 0  # only rank 0 talks
    assert [step["step"] for step in read_steps(jsonl)] == [1, 2, 3]

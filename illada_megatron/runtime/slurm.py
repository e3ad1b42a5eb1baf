"""Ranks that Slurm's srun starts itself, one task each: its variables in torch's names."""

import os
import re
from collections.abc import Mapping

_FIRST_PORT, _PORTS = 10_000, 20_000  # below the ephemeral ones


def adopt_slurm_rank() -> bool:
    """Where srun started this process as one task of several, announce it as torchrun would (RANK, WORLD_SIZE, ...)
    and say so."""
    variables = rank_variables(os.environ)
    os.environ.update(variables)
    return bool(variables)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's variables from those of a job step's task; none where this is no task of a step of several, or where a
    launcher has set RANK already.

    A batch script has SLURM_PROCID and SLURM_NTASKS too; only srun sets the step's variables. MASTER_ADDR and
    MASTER_PORT are kept where the user gives them; else the step's first machine and a port made of the job's number.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 or "RANK" in environment:
        return {}
    here = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
    # --gpus-per-task shows each task one GPU, its own, as number 0
    own_gpu = here > 1 and "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
    number = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if own_gpu else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_FIRST_PORT + number % _PORTS),
    }


def first_host(node_list: str) -> str:
    """`rack1-node[07-12,15],login2` -> `rack1-node07`."""
    return re.sub(r"\[([^\]\-,]+)[^\]]*\]", r"\1", node_list).split(",")[0]


def _tasks_per_node(text: str) -> list[int]:
    """`8(x3),4` -> [8, 8, 8, 4]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE {text!r}: expected counts like 8(x3),4")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts

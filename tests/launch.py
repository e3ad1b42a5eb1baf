"""The real command line in real processes: what the tests of training, checkpoints and the CLI share."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from fork_server import ForkServer

from illada_megatron.runtime.loopback import quiet_port

ROOT = Path(__file__).parents[1]
# Far above what any run takes on a loaded machine: it only keeps a hang from blocking the suite.
HANG_SECONDS = 900

# 4 layers, grouped queries, a padded vocabulary (250 -> 256), 30% split sequences, stratified t, clipping at every
# step, eight micro-batches a step: everything a layout could get wrong, at the smallest size.
SMALL = (
    *("model.num_layers=4", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=250", "model.max_sequence_length=64", "data.sequence_length=32"),
    *("training.precision=fp32", "training.micro_batch_size=1", "training.global_batch_size=8"),
    *("training.train_steps=20", "training.lr=5e-3", "schedule.warmup_steps=3", "optimizer.clip_grad=0.5"),
    *("runtime.device=cpu", "runtime.num_threads=1"),
)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    process: subprocess.CompletedProcess[str]
    steps: list[dict[str, Any]]
    """The lines of its logging.jsonl_path; earlier runs' too where they wrote to the same file."""

    @property
    def output(self) -> str:
        return f"{self.process.stdout}\n{self.process.stderr}"


@dataclass(frozen=True)
class Outcome:
    """What the command line did in this process."""

    code: int
    out: str
    err: str


Illada = Callable[..., Outcome]
"""illada(*arguments): see conftest.py."""

TrainOnce = Callable[..., Run]
"""train_once(nproc, *overrides): see training/conftest.py."""


def launch(
    command: str,
    arguments: Sequence[str | Path],
    nproc: int = 1,
    jsonl: Path | None = None,
    interrupt: Callable[[psutil.Process], None] | None = None,
) -> Run:
    """Run `illada COMMAND --nproc NPROC ARGUMENTS` and wait for it.

    interrupt: is called with the launcher's process while it runs.
    """
    line = [sys.executable, "-m", "illada_megatron", command, *map(str, arguments)]
    if nproc > 1:
        line += ["--nproc", str(nproc)]
    if jsonl is not None:
        line.append(f"logging.jsonl_path={jsonl}")
    # the ranks' kernels are tiny: threads of them would only wait for each other
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # files: nobody reads while `interrupt` works, and a pipe that is full stops the launcher
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(line, stdout=stdout, stderr=stderr, env=environment)
        try:
            if interrupt is not None:
                interrupt(psutil.Process(process.pid))
            process.wait(timeout=HANG_SECONDS)
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()
        for file in (stdout, stderr):
            file.seek(0)
        completed = subprocess.CompletedProcess(line, process.returncode, stdout.read(), stderr.read())
    return Run(completed, read_steps(jsonl) if jsonl is not None and jsonl.exists() else [])


def run_warm(
    command: str,
    arguments: Sequence[str | Path],
    nproc: int = 1,
    jsonl: Path | None = None,
    seconds: float = HANG_SECONDS,
) -> Run:
    """The same as `launch`, for tests of what ranks compute: without the launcher, and each rank a copy of a process
    that has imported everything, which takes most of such a run's time."""
    line = [command, *map(str, arguments), *([f"logging.jsonl_path={jsonl}"] if jsonl is not None else [])]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(quiet_port())}
    sizes = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    with tempfile.TemporaryDirectory() as directory:
        outputs = [(Path(directory) / f"out{rank}", Path(directory) / f"err{rank}") for rank in range(nproc)]
        pids = [
            _server().start(
                line, out, {**meet, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} if nproc > 1 else {}, err
            )
            for rank, (out, err) in enumerate(outputs)
        ]
        codes = _server().wait(pids, HANG_SECONDS)
        stdout, stderr = ("".join(one.read_text() for one in streams) for streams in zip(*outputs, strict=True))
    code = next((one if one is not None else -signal.SIGKILL for one in codes if one != 0), 0)
    completed = subprocess.CompletedProcess(line, code, stdout, stderr)
    return Run(completed, read_steps(jsonl) if jsonl is not None and jsonl.exists() else [])


@functools.cache
def _server() -> ForkServer:
    """Of this session of tests; it ends with it."""
    return ForkServer(["illada_megatron.cli.main", "illada_megatron.training.trainer", "illada_megatron.training"])


def read_steps(jsonl: Path) -> list[dict[str, Any]]:
    """The complete lines of a log that may be growing."""
    text = jsonl.read_text() if jsonl.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_step(jsonl: Path, step: int, launcher: psutil.Process) -> None:
    """Return as soon as the run has logged `step`; fails where it ended before."""
    begin = time.monotonic()
    while not any(record["step"] >= step for record in read_steps(jsonl)):
        assert launcher.status() != psutil.STATUS_ZOMBIE, f"ended before step {step}"
        assert time.monotonic() - begin < HANG_SECONDS, f"hangs before step {step}"
        time.sleep(0.01)


def rank_processes(launcher: psutil.Process) -> list[psutil.Process]:
    """The ranks below a launcher, in order."""
    ranks = [child for child in launcher.children() if "RANK" in child.environ()]
    return sorted(ranks, key=lambda process: int(process.environ()["RANK"]))

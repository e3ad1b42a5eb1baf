"""Resharding a checkpoint against `cp` of the same bytes, both durable at the end. See benchmarks/README.md.

python -m benchmarks.checkpoint.reshard --directory /data/scratch --gigabytes 3 --rounds 5"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.data.random_shards import machine
from benchmarks.measuring.bars import at_least, at_most, show_bars
from illada_megatron.checkpoint.files.metadata import TensorInfo
from illada_megatron.checkpoint.files.names import MOMENTS, WEIGHT, split_name, tensor_name
from illada_megatron.checkpoint.tools.rewriting import Content, rewrite
from illada_megatron.config import RunConfig, load_config
from illada_megatron.config.parameters import parameters

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, str(ROOT / "tools" / "reshard_checkpoint.py"))
# what is made of the checkpoint of TP2 x PP2
VARIANTS = {
    "reshard to TP4 PP1": ("--tp", "4", "--pp", "1"),
    "reshard to TP1 PP4": ("--tp", "1", "--pp", "4"),
    "reshard to legacy TP2 PP4": ("--tp", "2", "--pp", "4", "--format", "legacy"),
}
BAR_SPEED, BAR_BYTES = 0.5, 1e9
SAMPLE_SECONDS = 0.5  # a sample takes the processor for a while itself


class RandomSource:
    """All tensors of a bf16 checkpoint with the distributed optimizer's state, normal values."""

    def __init__(self, config: RunConfig) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        for parameter in parameters(config.model):
            for name in (tensor_name(parameter.name, state) for state in (WEIGHT, *MOMENTS, "main")):
                dtype = torch.float32 if split_name(name).state else torch.bfloat16
                self.tensors[name] = TensorInfo(parameter.shape, dtype, [])

    def read(
        self,
        name: str,
        offset: Sequence[int] | None = None,  # noqa: ARG002 (all values are alike)
        shape: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        box = torch.empty(tuple(shape or self.tensors[name].shape), dtype=self.tensors[name].dtype)
        return (box if out is None else out).normal_()


def main(
    directory: Annotated[Path | None, typer.Option(help="where to work; default: the temporary directory")] = None,
    gigabytes: Annotated[float, typer.Option(help="of the checkpoint, about")] = 3.0,
    rounds: Annotated[int, typer.Option(help="rounds; in each, every variant runs once")] = 5,
    processes: Annotated[int | None, typer.Option(help="default: the command's")] = None,
) -> None:
    """The last line of standard output is JSON."""
    console = Console(stderr=True)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=directory) as name:
        folder = Path(name)
        source = make_checkpoint(folder / "source", gigabytes)
        files = [file for file in source.rglob("*") if file.is_file()]
        nbytes = sum(file.stat().st_size for file in files)
        console.print(f"made a checkpoint of {nbytes / 1e9:.2f} GB in {folder}")
        results: dict[str, list[dict[str, float]]] = {variant: [] for variant in ("cp", *VARIANTS)}
        for round_ in range(rounds):
            # another first one each round
            order = list(results)[round_ % len(results) :] + list(results)[: round_ % len(results)]
            for variant in order:
                read_through(files)  # in the page cache, as far as it fits there, for all alike
                os.sync()
                extra = ("--processes", str(processes)) if processes else ()
                results[variant].append(
                    copy(source, folder / "new")
                    if variant == "cp"
                    else measure([*COMMAND, str(source), str(folder / "new"), *VARIANTS[variant], *extra])
                )
                shutil.rmtree(folder / "new")
            console.print(f"round {round_}: " + ", ".join(f"{v} {results[v][-1]['seconds']:.2f} s" for v in results))
    report(console, results, nbytes, load_before)


def make_checkpoint(path: Path, gigabytes: float) -> Path:
    """Saved as TP2 x PP2, with 14 bytes a parameter: bf16 weights, fp32 main weights and two moments."""
    layers = 8
    hidden = max(1, round((gigabytes * 1e9 / 14 / (24 * layers)) ** 0.5 / 256)) * 256
    config = load_config(
        None,
        [
            *(f"model.num_layers={layers}", f"model.hidden_size={hidden}", f"model.ffn_hidden_size={3 * hidden}"),
            *(f"model.num_attention_heads={hidden // 64}", "model.num_query_groups=4"),
            *(f"model.vocab_size={hidden * 96}", "training.precision=bf16"),
            *("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"),
        ],
    )
    progress = {"step": 1, "consumed_samples": 8, "schedule": {}, "optimizer_step": 1}
    rewrite(Content(RandomSource(config), "random numbers", 1, config, progress, {}, ()), path)
    return path


def read_through(files: Sequence[Path]) -> None:
    block = bytearray(1 << 24)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass


def copy(source: Path, target: Path) -> dict[str, float]:
    """`cp` with fsync of each copy and of the directories, as reshard does."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in [*target.rglob("*"), target, target.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": time.perf_counter() - begin}


def measure(command: Sequence[str]) -> dict[str, float]:
    """The whole command, start of Python included, and the most that its processes held together (proportional set
    sizes, sampled)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, proportional_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit(f"{' '.join(command)}: ended with {process.returncode}")
    return {"seconds": seconds, "peak_bytes": peak}


def proportional_bytes(pid: int) -> int:
    """Of a process and all below it; pages that several have count once."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for one in (parent, *parent.children(recursive=True)):
            text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
            found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
    except (psutil.Error, OSError):
        return 0  # one of them has just ended
    return total


def report(console: Console, results: dict[str, list[dict[str, float]]], nbytes: int, load_before: float) -> None:
    speeds = {v: nbytes / 1e9 / statistics.median(run["seconds"] for run in runs) for v, runs in results.items()}
    table = Table("", "GB/s", "of cp", "seconds", "peak MB")
    bars: dict[str, dict[str, Any]] = {}
    for variant, runs in results.items():
        pairs = zip(results["cp"], runs, strict=True)
        ratio = statistics.median(cp["seconds"] / run["seconds"] for cp, run in pairs)
        peak = max(run.get("peak_bytes", 0) for run in runs)
        seconds = ", ".join(f"{run['seconds']:.2f}" for run in runs)
        table.add_row(variant, f"{speeds[variant]:.3f}", f"{ratio:.2f}", seconds, f"{peak / 1e6:.0f}" if peak else "")
        if variant != "cp":
            bars[f"{variant}: speed / cp"] = at_least(BAR_SPEED, ratio)
            bars[f"{variant}: peak bytes"] = at_most(BAR_BYTES, peak)
    console.print(table)
    show_bars(console, bars)
    figures = {
        "benchmark": "reshard",
        "gigabytes": round(nbytes / 1e9, 3),
        "median_gb_per_s": {variant: round(speed, 3) for variant, speed in speeds.items()},
        "runs": results,
        "bars": bars,
        "holds": all(bar["holds"] for bar in bars.values()),
        "load_average": [load_before, os.getloadavg()[0]],
        "machine": machine(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)

"""Merging and verifying shards against `cp` of the same bytes. See benchmarks/README.md.

python -m benchmarks.data.merge --directory /data/scratch --shards 8 --shard-tokens 125000000"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.data.random_shards import VOCAB_SIZE, machine, write_shard

BAR = 0.8

# each runs in a process of its own, which says how long the work took and how much memory it added at most
MEASURED = """
import json, sys, time
from pathlib import Path
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.shard_list import find_shards
from illada_megatron.data.shards.merge import merge
def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
before, begin = status("VmRSS"), time.perf_counter()
if sys.argv[1] == "merge":
    merge(find_shards(sys.argv[3:]), sys.argv[2])
else:
    for prefix in sys.argv[3:]:
        IndexedDataset(prefix).verify(int(sys.argv[2]))
seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "added_memory_mb": status("VmHWM") - before, "peak_memory_mb": status("VmHWM")}))
"""


def main(
    directory: Annotated[Path | None, typer.Option(help="where to work; default: the temporary directory")] = None,
    shards: Annotated[int, typer.Option(help="number of inputs")] = 4,
    shard_tokens: Annotated[int, typer.Option(help="tokens of each (2 bytes a token)")] = 125_000_000,
    rounds: Annotated[int, typer.Option(help="rounds; in each, every variant runs once")] = 5,
) -> None:
    """The last line of standard output is JSON."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        folder = Path(name)
        console.print(f"writing {shards} shards of {shard_tokens:,} tokens to {folder}")
        prefixes = [str(write_shard(folder / f"in_{i}", shard_tokens, seed=i)) for i in range(shards)]
        files = [prefix + suffix for prefix in prefixes for suffix in (".bin", ".idx")]
        gigabytes = sum(Path(file).stat().st_size for file in files) / 1e9
        variants = {
            "cp": lambda: copy(files, folder / "copies", flush=False),
            "cp, flushed": lambda: copy(files, folder / "copies", flush=True),
            "merge": lambda: measure("merge", str(folder / "out"), *prefixes),
            "verify": lambda: measure("verify", str(VOCAB_SIZE), *prefixes),
        }
        for file in files:  # all of them in the page cache, as what was just written is
            with Path(file).open("rb") as stream:
                while stream.read(1 << 24):
                    pass
        results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for round_ in range(rounds):
            # another first one each round
            order = list(variants)[round_ % len(variants) :] + list(variants)[: round_ % len(variants)]
            for variant in order:
                os.sync()
                results[variant].append(variants[variant]())
                shutil.rmtree(folder / "copies", ignore_errors=True)
                for suffix in (".bin", ".idx"):
                    (folder / f"out{suffix}").unlink(missing_ok=True)
            console.print(f"round {round_}: " + ", ".join(f"{v} {results[v][-1]['seconds']:.2f} s" for v in variants))
    speeds = {v: gigabytes / statistics.median(run["seconds"] for run in runs) for v, runs in results.items()}
    figures: dict[str, Any] = {
        "benchmark": "merge",
        "gigabytes": round(gigabytes, 3),
        "shards": shards,
        "median_gb_per_s": {variant: round(speed, 3) for variant, speed in speeds.items()},
        "seconds": {variant: [round(run["seconds"], 3) for run in runs] for variant, runs in results.items()},
        **{
            memory: {v: round(max(run[memory] for run in results[v]), 1) for v in ("merge", "verify")}
            for memory in ("added_memory_mb", "peak_memory_mb")
        },
        "merge_to_cp_flushed": round(speeds["merge"] / speeds["cp, flushed"], 3),
        "verify_to_cp": round(speeds["verify"] / speeds["cp"], 3),
        "machine": machine(),
    }
    # merge flushes, so it is compared with the cp that does; verify only reads: with the faster cp
    figures["holds"] = figures["merge_to_cp_flushed"] >= BAR and figures["verify_to_cp"] >= BAR
    print(json.dumps(figures))


def copy(files: list[str], to: Path, flush: bool) -> dict[str, float]:
    """`cp` into a new folder; flush: with fsync of each copy and of the folder, as merge does."""
    to.mkdir()
    begin = time.perf_counter()
    subprocess.run(["cp", *files, str(to)], check=True)
    if flush:
        for path in [*to.iterdir(), to]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return {"seconds": time.perf_counter() - begin}


def measure(*arguments: str) -> dict[str, float]:
    run = [sys.executable, "-c", MEASURED, *arguments]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    typer.run(main)

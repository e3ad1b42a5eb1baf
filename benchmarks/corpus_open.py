"""What opening a corpus of 12T tokens costs: time and memory of a fresh process until its first batch.

    python benchmarks/corpus_open.py --folder /tmp/corpus_open

1,500 int32 shards of 8e9 tokens are made as sparse files: 48 TB apparent size, a few MB on the disk. Every measurement
is a process of its own, in turn: the corpus by its manifest and by a glob, at sample 0 and at sample 10^9, and a blend
of 20 corpora of 75 shards each. Ends with one line of JSON."""

import json
import platform
import statistics
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from illada_megatron.data.manifest import Manifest, ShardEntry, write_manifest

SHARDS, SHARD_TOKENS, DOCUMENTS, BLEND = 1500, 8_000_000_000, 4, 20
LIMIT_SECONDS, LIMIT_MB, LIMIT_RATIO = 1.0, 50.0, 1.25
FAR = 10**9

# What a rank does: open the corpus, read a micro-batch of 8 x 8,192 tokens, then 200 samples one by one. The base line
# is the interpreter with numpy and this package imported, which every rank has in any case.
MEASURED = """
import json, sys, time
import numpy as np
import psutil
from illada_megatron.config.schema import DataConfig
from illada_megatron.data import training_corpus
first, data = int(sys.argv[1]), DataConfig.model_validate_json(sys.argv[2])
base, started = psutil.Process().memory_info().rss, time.perf_counter()
corpus = training_corpus(data, 1234, 155_136, None)
opened = time.perf_counter() - started
batch = np.empty((8, data.sequence_length), np.int64)
corpus.read(range(first, first + 8), batch)
seconds, used = time.perf_counter() - started, psutil.Process().memory_info().rss - base
one, times = np.empty((1, data.sequence_length), np.int64), []
for index in range(first + 8, first + 208):
    start = time.perf_counter()
    corpus.read([index], one)
    times.append(time.perf_counter() - start)
print(json.dumps({"tokens": corpus.num_tokens, "open_seconds": opened, "first_batch_seconds": seconds,
                  "memory_mb": used / 1e6, "sample_microseconds": sorted(times)[100] * 1e6}))
"""


def _make_shards(folder: Path) -> Path:
    """The manifest of all shards; those of the blend's corpora lie beside it."""
    manifest = folder / "corpus.manifest.json"
    if manifest.exists():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.full(DOCUMENTS, SHARD_TOKENS // DOCUMENTS, dtype=np.int32)
    pointers = np.arange(DOCUMENTS, dtype=np.int64) * (4 * SHARD_TOKENS // DOCUMENTS)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, DOCUMENTS, DOCUMENTS + 1)
    index = header + lengths.tobytes() + pointers.tobytes() + np.arange(DOCUMENTS + 1, dtype=np.int64).tobytes()
    entries = []
    for number in range(SHARDS):
        name = f"shard_{number:05d}"
        (folder / f"{name}.idx").write_bytes(index)
        with (folder / f"{name}.bin").open("wb") as stream:
            stream.truncate(4 * SHARD_TOKENS)
        entries.append(ShardEntry(path=name, dtype="int32", tokens=SHARD_TOKENS, documents=DOCUMENTS))
    for number, part in enumerate(np.array_split(np.arange(SHARDS), BLEND)):
        chosen = tuple(entries[index] for index in part)
        write_manifest(Manifest(vocab_size=155_136, shards=chosen), folder / f"part_{number:02d}.manifest.json")
    write_manifest(Manifest(vocab_size=155_136, shards=tuple(entries)), manifest)
    return manifest


def _cases(folder: Path) -> dict[str, tuple[int, dict[str, object]]]:
    """(first sample, data section) by name."""
    manifest = {"train_paths": [str(_make_shards(folder))], "sequence_length": 8192}
    parts = [
        {"name": f"part_{number:02d}", "paths": [f"{folder}/part_{number:02d}.manifest.json"], "weight": number + 1.5}
        for number in range(BLEND)
    ]
    blend = {"blend": parts, "sequence_length": 8192}
    return {
        "manifest": (0, manifest),
        "manifest, sample 1e9": (FAR, manifest),
        "glob": (0, {**manifest, "train_paths": [f"{folder}/shard_*"]}),
        "blend of 20": (0, blend),
        "blend of 20, sample 1e9": (FAR, blend),
    }


def main(
    folder: Annotated[Path, typer.Option(help="takes the sparse shards; kept for the next time")] = Path(
        "/tmp/illada_corpus_open"
    ),
    rounds: Annotated[int, typer.Option(help="interleaved rounds; medians are reported")] = 7,
) -> None:
    """Open 12T tokens."""
    cases = _cases(folder)
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for name, (first, data) in cases.items():
            command = [sys.executable, "-c", MEASURED, str(first), json.dumps(data)]
            runs[name].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    figures = {
        name: {key: round(statistics.median(run[key] for run in found), 4) for key in found[0]}
        for name, found in runs.items()
    }
    print(f"{'':26}{'tokens':>8}{'open':>10}{'+ batch':>10}{'memory':>10}{'a sample':>12}")
    for name, found in figures.items():
        print(
            f"{name:26}{found['tokens']:8.1e}{found['open_seconds']:8.3f} s{found['first_batch_seconds']:8.3f} s"
            f"{found['memory_mb']:7.1f} MB{found['sample_microseconds']:9.1f} us"
        )
    ratios = {
        name: figures[f"{name}, sample 1e9"]["sample_microseconds"] / figures[name]["sample_microseconds"]
        for name in ("manifest", "blend of 20")
    }
    holds = all(
        found["first_batch_seconds"] < LIMIT_SECONDS and found["memory_mb"] < LIMIT_MB for found in figures.values()
    ) and all(ratio < LIMIT_RATIO for ratio in ratios.values())
    machine = {"cores": psutil.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    far = {name: round(ratio, 3) for name, ratio in ratios.items()}
    print(json.dumps({"figures": figures, "sample_1e9_over_0": far, "machine": machine, "holds": holds}))


if __name__ == "__main__":
    typer.run(main)

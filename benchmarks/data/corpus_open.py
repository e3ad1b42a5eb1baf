"""What opening a corpus of 12T tokens costs: time and memory of a fresh process until its first batch.

    python -m benchmarks.data.corpus_open --folder /tmp/corpus_open

1,500 int32 shards of 8e9 tokens are made as sparse files: 48 TB apparent size, a few MB on the disk. Every measurement
is a process of its own, in turn: the corpus by its manifest and by a glob, at sample 0 and at sample 10^9, and a blend
of 20 corpora of 75 shards each. The peers, in the same rounds, do a 1,200th of the work: megatron-core's GPTDataset
opens 10^7 documents of 1,000 tokens, its blending index mixes 20 corpora into 10^7 samples; both are linear in that.
The last line is one line of JSON."""

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

from illada_megatron.data.shards.manifest import Manifest, ShardEntry, write_manifest

SHARD_TOKENS, DOCUMENTS, BLEND = 8_000_000_000, 4, 20
LIMIT_SECONDS, LIMIT_MB, LIMIT_RATIO = 1.0, 50.0, 1.25
FAR = 10**9
PEER_DOCUMENT_TOKENS = 1000

# What a rank does: open the corpus and read a micro-batch of 8 x 8,192 tokens. The base line is the interpreter with
# numpy and this package imported, which every rank has in any case. Then what one sample takes, among the first and far
# behind: 200 of each in turns, five times, and all of them once before, so that no page fault is timed.
MEASURED = """
import json, statistics, sys, time
import numpy as np
import psutil
from illada_megatron.config.schema import DataConfig
from illada_megatron.data.corpus.configured import training_corpus
first, far, data = int(sys.argv[1]), int(sys.argv[2]), DataConfig.model_validate_json(sys.argv[3])
base, started = psutil.Process().memory_info().rss, time.perf_counter()
corpus = training_corpus(data, 1234, 155_136, None)
opened = time.perf_counter() - started
batch = np.empty((8, data.sequence_length), np.int64)
corpus.read(range(first, first + 8), batch)
seconds, used = time.perf_counter() - started, psutil.Process().memory_info().rss - base
one, times = np.empty((1, data.sequence_length), np.int64), {0: [], far: []}
for turn in range(6):
    for index in range(200):
        for begin, spent in times.items():
            start = time.perf_counter()
            corpus.read([begin + index], one)
            if turn:
                spent.append(time.perf_counter() - start)
near_microseconds, far_microseconds = (1e6 * statistics.median(spent) for spent in times.values())
print(json.dumps({"tokens": corpus.num_tokens, "open_seconds": opened, "first_batch_seconds": seconds,
                  "memory_mb": used / 1e6, "sample_microseconds": near_microseconds,
                  "far_sample_microseconds": far_microseconds, "far_over_near": far_microseconds / near_microseconds}))
"""

PEER_DATASET = """
import json, sys, time, types
import numpy as np
import psutil
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
tokenizer = types.SimpleNamespace(eod=0, pad=0, vocab_size=50_000, unique_identifiers={"class": "benchmark"})
config = GPTDatasetConfig(random_seed=1234, sequence_length=8192, blend=None, split="1,0,0", path_to_cache=None,
                          tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
                          eod_mask_loss=False, create_attention_mask=False)
base, started = psutil.Process().memory_info().rss, time.perf_counter()
indexed = IndexedDataset(sys.argv[1], mmap=True)
documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
dataset = GPTDataset(indexed, sys.argv[1], documents, None, Split.train, config)
opened = time.perf_counter() - started
batch = [dataset[index] for index in range(8)]
print(json.dumps({"tokens": int(indexed.sequence_lengths.sum()), "open_seconds": opened,
                  "first_batch_seconds": time.perf_counter() - started,
                  "memory_mb": (psutil.Process().memory_info().rss - base) / 1e6}))
"""
PEER_BLENDING = """
import json, sys, time
import numpy as np
import psutil
from megatron.core.datasets import helpers
size, weights = int(sys.argv[1]), np.arange(20) + 1.5
base, started = psutil.Process().memory_info().rss, time.perf_counter()
dataset_index, dataset_sample_index = np.zeros(size, np.int16), np.zeros(size, np.int64)
helpers.build_blending_indices(dataset_index, dataset_sample_index, weights / weights.sum(), 20, size, False)
seconds = time.perf_counter() - started
print(json.dumps({"tokens": size * 8192, "open_seconds": seconds, "first_batch_seconds": seconds,
                  "memory_mb": (psutil.Process().memory_info().rss - base) / 1e6}))
"""


def _make_shards(folder: Path, shards: int) -> Path:
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
    for number in range(shards):
        name = f"shard_{number:05d}"
        (folder / f"{name}.idx").write_bytes(index)
        with (folder / f"{name}.bin").open("wb") as stream:
            stream.truncate(4 * SHARD_TOKENS)
        entries.append(ShardEntry(path=name, dtype="int32", tokens=SHARD_TOKENS, documents=DOCUMENTS))
    for number, part in enumerate(np.array_split(np.arange(shards), BLEND)):
        chosen = tuple(entries[index] for index in part)
        write_manifest(Manifest(vocab_size=155_136, shards=chosen), folder / f"part_{number:02d}.manifest.json")
    write_manifest(Manifest(vocab_size=155_136, shards=tuple(entries)), manifest)
    return manifest


def _make_peer(folder: Path, count: int) -> Path:
    """A shard of `count` short documents, which is what the peer's cost grows with."""
    prefix = folder / "peer"
    with prefix.with_suffix(".idx").open("wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count + 1))
        np.full(count, PEER_DOCUMENT_TOKENS, dtype=np.int32).tofile(stream)
        (np.arange(count, dtype=np.int64) * 2 * PEER_DOCUMENT_TOKENS).tofile(stream)
        np.arange(count + 1, dtype=np.int64).tofile(stream)
    with prefix.with_suffix(".bin").open("wb") as stream:
        stream.truncate(2 * PEER_DOCUMENT_TOKENS * count)
    return prefix


def _cases(folder: Path, shards: int) -> dict[str, tuple[int, dict[str, object]]]:
    """(first sample, data section) by name."""
    manifest = {"train_paths": [str(_make_shards(folder, shards))], "sequence_length": 8192}
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
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds; medians are reported")] = 7,
    shards: Annotated[int, typer.Option(min=BLEND, help="of 8e9 tokens each")] = 1500,
    peer_size: Annotated[int, typer.Option(min=1000, help="documents, and samples of the blend, of the peers")] = 10**7,
) -> None:
    """Open 12T tokens."""
    folder = folder / f"{shards}_shards"
    cases = _cases(folder, shards)
    peers = {
        f"GPTDataset, {peer_size:.0e} documents": [PEER_DATASET, str(_make_peer(folder, peer_size))],
        f"its blend of 20, {peer_size:.0e} samples": [PEER_BLENDING, str(peer_size)],
    }
    ours = {name: [MEASURED, str(first), str(FAR), json.dumps(data)] for name, (first, data) in cases.items()}
    commands = ours | peers
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for name, (script, *arguments) in commands.items():
            command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
            runs[name].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    figures = {
        name: {key: round(statistics.median(run[key] for run in found), 4) for key in found[0]}
        for name, found in runs.items()
    }
    print(f"{'':30}{'tokens':>8}{'open':>10}{'+ batch':>10}{'memory':>10}{'a sample':>12}{'at 1e9':>12}")
    for name, found in figures.items():
        print(
            f"{name:30}{found['tokens']:8.1e}{found['open_seconds']:8.3f} s{found['first_batch_seconds']:8.3f} s"
            f"{found['memory_mb']:7.1f} MB"
            + "".join(
                f"{found[key]:9.1f} us" for key in ("sample_microseconds", "far_sample_microseconds") if key in found
            )
        )
    holds = all(
        figures[name]["first_batch_seconds"] < LIMIT_SECONDS
        and figures[name]["memory_mb"] < LIMIT_MB
        and figures[name]["far_over_near"] < LIMIT_RATIO
        for name in cases
    )
    machine = {"cores": psutil.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "corpus_open", "figures": figures, "machine": machine, "holds": holds}))


if __name__ == "__main__":
    typer.run(main)

"""What the measurements of shards share: shards of random tokens, and the machine."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring.machine import commit, cpu_model
from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter

VOCAB_SIZE = 32_000
_WRITTEN_AT_A_TIME = 1 << 22


def write_shard(prefix: Path, tokens: int, seed: int = 0) -> Path:
    """At least `tokens` uniformly random ids below VOCAB_SIZE (uint16); documents of lognormal lengths, median 500
    tokens, mean 1,030 (as web text has)."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, VOCAB_SIZE) as writer:
        while writer.num_tokens < tokens:
            wanted = min(_WRITTEN_AT_A_TIME, tokens - writer.num_tokens)
            lengths = np.exp(generator.normal(np.log(500), 1.2, max(1, wanted // 1000))).astype(np.int64) + 1
            writer.add(generator.integers(0, VOCAB_SIZE, lengths.sum(), dtype=np.uint16), lengths)
    return prefix


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit(),
        **{package: version(package) for package in ("numpy", "xxhash", "megatron-core")},
    }

"""Random samples of a page-cached shard: memcpy, TokenReader and megatron-core's GPTDataset. See benchmarks/README.md.

python -m benchmarks.data.read_samples --tokens 500000000 --sequence-length 8192"""

import ctypes
import json
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.data.random_shards import VOCAB_SIZE, machine, write_shard
from illada_megatron.data.shards._indexed_dataset import TokenReader

READ_BAR, MEGATRON_BAR = 0.8, 1.7

# what no reader can be faster than: the loop over a batch's windows in C, and nothing in it but memcpy
MEMCPY = """
#include <stdint.h>
#include <string.h>
void copy_windows(const uint16_t *from, const int64_t *starts, int64_t rows, int64_t length, uint16_t *to) {
  for (int64_t row = 0; row < rows; ++row) memcpy(to + row * length, from + starts[row], length * sizeof(uint16_t));
}
"""

Variant = Callable[[np.ndarray], object]


def main(
    directory: Annotated[Path | None, typer.Option(help="where to work; default: the temporary directory")] = None,
    tokens: Annotated[int, typer.Option(help="tokens of the shard (2 bytes a token)")] = 500_000_000,
    sequence_length: Annotated[int, typer.Option(help="tokens in a sample")] = 8192,
    rows: Annotated[int, typer.Option(help="samples in a batch: a call of the reader")] = 8,
    batches: Annotated[int, typer.Option(help="batches of each variant in a round")] = 100,
    rounds: Annotated[int, typer.Option(min=2, help="rounds; in each, every variant runs once")] = 101,
) -> None:
    """The last line of standard output is JSON."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        console.print(f"writing {tokens:,} tokens to {name}")
        prefix = write_shard(Path(name) / "shard", tokens)
        variants, total = make_variants(prefix, sequence_length, rows)
        speeds: dict[str, list[float]] = {variant: [] for variant in variants}
        cpu_speeds: dict[str, list[float]] = {variant: [] for variant in variants}
        generator = np.random.default_rng(1)
        for round_ in range(-1, rounds):
            order = list(variants)[round_ % len(variants) :] + list(variants)[: round_ % len(variants)]
            for variant in order:
                windows = generator.integers(0, total - sequence_length, (batches, rows))
                begin, cpu_begin = time.perf_counter(), time.process_time()
                for starts in windows:
                    variants[variant](starts)
                seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
                if round_ >= 0:  # the first round warms caches and clocks up
                    speeds[variant].append(windows.size * sequence_length / seconds / 1e6)
                    cpu_speeds[variant].append(windows.size * sequence_length / cpu_seconds / 1e6)
    # by CPU time: nothing here waits, so on an idle machine it is wall time, and on a busy one wall time says how often
    # the neighbours had the core
    medians = {variant: statistics.median(values) for variant, values in cpu_speeds.items()}
    fastest = max(medians["memcpy in a C loop"], medians["numpy copyto"])
    figures: dict[str, Any] = {
        "benchmark": "read_samples",
        "million_tokens_per_cpu_s": {variant: round(median, 1) for variant, median in medians.items()},
        "quartiles": {v: [round(q, 1) for q in statistics.quantiles(values)] for v, values in cpu_speeds.items()},
        "wall_quartiles": {v: [round(q, 1) for q in statistics.quantiles(values)] for v, values in speeds.items()},
        "to_memcpy": {v: round(median / fastest, 3) for v, median in medians.items()},
        "to_gpt_dataset": {v: round(median / medians["GPTDataset"], 2) for v, median in medians.items()},
        **{"tokens": total, "sequence_length": sequence_length, "rows": rows, "rounds": rounds},
        "machine": machine(),
    }
    figures["holds"] = (
        figures["to_memcpy"]["TokenReader, uint16"] >= READ_BAR
        and figures["to_gpt_dataset"]["TokenReader, int64"] >= MEGATRON_BAR
    )
    print(json.dumps(figures))


def make_variants(prefix: Path, sequence_length: int, rows: int) -> tuple[dict[str, Variant], int]:
    """Each takes int64 [rows] stream offsets and delivers these samples (GPTDataset: as many of its own, in its own
    random order). Their maps are touched entirely before, so that no page fault is timed. Also the shard's tokens."""
    stream = np.memmap(f"{prefix}.bin", np.uint16, "r").view(np.ndarray)
    total = len(stream)
    stream.max()
    reader = TokenReader([f"{prefix}.bin"], ["uint16"], [total])
    reader.read(np.array([0]), np.empty((1, total), dtype=np.uint16), VOCAB_SIZE)
    buffers = {dtype: np.zeros((rows, sequence_length), dtype=dtype) for dtype in (np.uint16, np.int32, np.int64)}
    narrow = buffers[np.uint16]
    copy_windows = compiled_memcpy(prefix.parent)

    def memcpy(starts: np.ndarray) -> None:
        copy_windows(stream.ctypes.data, starts.ctypes.data, rows, sequence_length, narrow.ctypes.data)

    def copyto(starts: np.ndarray) -> None:
        for row, start in zip(narrow, starts.tolist(), strict=True):
            np.copyto(row, stream[start : start + sequence_length])

    def read(dtype: type) -> Variant:
        return lambda starts: reader.read(starts, buffers[dtype], VOCAB_SIZE)

    def read_singly(starts: np.ndarray) -> None:
        for row in range(rows):
            reader.read(starts[row : row + 1], buffers[np.int64][row : row + 1], VOCAB_SIZE)

    dataset = gpt_dataset(prefix, sequence_length)
    for i in range(len(dataset)):
        dataset[i]
    order = iter(range(1 << 60))

    def gpt(_: np.ndarray) -> None:
        # its shuffle makes consecutive indices random places
        for _ in range(rows):
            dataset[next(order) % len(dataset)]

    return {
        "memcpy in a C loop": memcpy,
        "numpy copyto": copyto,
        "TokenReader, uint16": read(np.uint16),
        "TokenReader, int32": read(np.int32),
        "TokenReader, int64": read(np.int64),
        "TokenReader, int64, one sample a call": read_singly,
        "GPTDataset": gpt,
    }, total


def compiled_memcpy(folder: Path) -> Callable[..., None]:
    (folder / "memcpy.c").write_text(MEMCPY)
    subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", "memcpy.so", "memcpy.c"], cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "memcpy.so")).copy_windows
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, number, number, pointer]
    function.restype = None
    return function


def gpt_dataset(prefix: Path, sequence_length: int) -> Any:
    """megatron-core's, as published, with what makes it fastest: no attention mask, one epoch, masks cached."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split
        from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=sequence_length,
            blend=([str(prefix)], None),
            split="1,0,0",
            path_to_cache=str(prefix.parent / "cache"),
            tokenizer=NullTokenizer(VOCAB_SIZE - 1),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        low_level = GPTDataset.build_low_level_dataset(str(prefix), config)
        sequences = np.arange(GPTDataset.numel_low_level_dataset(low_level), dtype=np.int32)
        return GPTDataset(low_level, str(prefix), sequences, None, Split.train, config)


if __name__ == "__main__":
    typer.run(main)

"""Writes the seeds of the fuzzer: small indexes, of this package's builder and of megatron-core's."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter

SEEDS = Path(__file__).parent / "seeds"


def main() -> None:
    SEEDS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, vocab_size in (("ours_uint16", 1000), ("ours_int32", 100_000)):
            with IndexedDatasetWriter(folder / seed, vocab_size) as writer:
                writer.add(np.arange(11), [3, 0, 1, 6, 1])
        with IndexedDatasetWriter(folder / "one_document", 1000) as writer:
            writer.add(np.arange(11), [11])
        for dtype in (np.int16, np.int64):
            builder = IndexedDatasetBuilder(str(folder / f"megatron_{dtype.__name__}.bin"), dtype=dtype)
            builder.add_document(torch.arange(5), [2, 3])
            builder.end_document()  # a document of no sequences
            builder.add_document(torch.arange(6), [1, 0, 5])
            builder.finalize(str(folder / f"megatron_{dtype.__name__}.idx"))
        builder = IndexedDatasetBuilder(str(folder / "multimodal.bin"), dtype=np.uint16, multimodal=True)
        builder.add_document(torch.arange(11), [11], [1])
        builder.finalize(str(folder / "multimodal.idx"))
        for path in folder.glob("*.idx"):
            (SEEDS / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()

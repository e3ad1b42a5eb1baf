"""A small real corpus for tests: this package's own sources, as bytes."""

from pathlib import Path

import numpy as np

from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter

BYTE_VOCABULARY = 250  # 244 byte values (rarer ones folded) after the special ids
FIRST_BYTE_ID = 6


def write_corpus(prefix: Path, copies: int = 1) -> Path:
    """Shard of one document a source file; ids are bytes + 6, folded into BYTE_VOCABULARY. Returns its prefix."""
    sources = sorted((Path(__file__).parent.parent / "illada_megatron").rglob("*.py")) * copies
    with IndexedDatasetWriter(prefix, BYTE_VOCABULARY) as writer:
        for source in sources:
            data = np.frombuffer(source.read_bytes(), dtype=np.uint8).astype(np.int32)
            tokens = data % (BYTE_VOCABULARY - FIRST_BYTE_ID) + FIRST_BYTE_ID
            if len(tokens):
                writer.add(tokens, np.array([len(tokens)], dtype=np.int64))
    return prefix

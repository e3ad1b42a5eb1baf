"""What the step benchmark trains on: the shapes, and a small corpus of real text for each vocabulary."""

import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter

PRECISIONS = ("bf16", "fp32")
MASK_TOKEN_ID = 5
# Windows in the corpus, in global batches: measured steps read the first batch, the order is a permutation of all.
_CORPUS_BATCHES = 16


@dataclass(frozen=True)
class Workload:
    """Shapes of a training step of one process; sizes in units of tokens where not said otherwise."""

    name: str
    vocab_size: int
    hidden_size: int = 512
    num_layers: int = 8
    num_attention_heads: int = 8
    num_query_groups: int = 2
    ffn_hidden_size: int = 1792
    sequence_length: int = 1024
    micro_batch_size: int = 2
    """Sequences."""
    global_batch_size: int = 8
    """Sequences."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    def overrides(self) -> list[str]:
        """The workload as `section.field=value`."""
        model = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        return [
            *(f"model.{name}={getattr(self, name)}" for name in (*model, "vocab_size")),
            f"model.mask_token_id={MASK_TOKEN_ID}",
            f"model.max_sequence_length={self.sequence_length}",
            f"data.sequence_length={self.sequence_length}",
            "diffusion.attention_boundary=none",  # sequences whole: megatron-core's own attention takes no segments
            f"training.micro_batch_size={self.micro_batch_size}",
            f"training.global_batch_size={self.global_batch_size}",
        ]


# The two differ in the vocabulary alone: what the head costs.
WORKLOADS = {work.name: work for work in (Workload("W1", vocab_size=32_000), Workload("W2", vocab_size=155_136))}

_MINIATURE = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 224,
    "sequence_length": 128,
}
TINY_WORKLOADS = {
    work.name: work
    for work in (
        Workload("W1", vocab_size=1_024, **_MINIATURE),
        Workload("W2", vocab_size=4_992, **_MINIATURE),
    )
}
"""The same proportions in seconds instead of minutes: for tests of the benchmark, not for results. Vocabularies need no
padding, as above: megatron-core's loss counts padded rows."""


def write_corpus(prefix: Path, workload: Workload) -> Path:
    """Shard of the standard library's sources, one document a file, as many as the benchmark reads. Returns its prefix.

    A word's id is its CRC-32, folded into the ids after the special ones: frequencies are those of real text (a few
    ids make up most of it), and ids lie all over the vocabulary, so that embedding rows are as scattered as in
    training.
    """
    wanted = _CORPUS_BATCHES * workload.tokens_per_step
    written = 0
    with IndexedDatasetWriter(prefix, workload.vocab_size) as writer:
        for words in _source_words():
            hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.int64, len(words))
            first = MASK_TOKEN_ID + 1
            tokens = (hashes % (workload.vocab_size - first) + first).astype(np.int32)
            writer.add(tokens, np.array([len(tokens)], dtype=np.int64))
            written += len(tokens)
            if written >= wanted:
                break
    return prefix


def _source_words() -> Iterator[list[str]]:
    """Words, runs of blanks and signs of each module of the standard library, by name."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        words = re.findall(r"\w+|\s+|[^\w\s]", path.read_text(encoding="utf-8", errors="replace"))
        if words:
            yield words

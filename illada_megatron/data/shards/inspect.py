"""What is in shards, and whether it is what it should be."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset, Progress
from illada_megatron.data.shards.shard_list import FoundShard
from illada_megatron.data.tokenizers.tokenizer import Tokenizer

_COUNTED_AT_A_TIME = 1 << 20


@dataclass
class LengthStatistics:
    """Lengths of documents in tokens.

    histogram[0] counts the empty ones, histogram[k] those of 2^(k-1) to 2^k - 1 tokens."""

    histogram: np.ndarray = field(default_factory=lambda: np.zeros(65, dtype=np.int64))
    documents: int = 0
    tokens: int = 0
    shortest: int = 0
    longest: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count some more: int64 [n], n > 0."""
        # frexp's exponent is the number of bits; exact below 2^53
        self.histogram += np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=65)
        self.shortest = int(lengths.min()) if not self.documents else min(self.shortest, int(lengths.min()))
        self.longest = max(self.longest, int(lengths.max()))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())

    def buckets(self) -> Iterator[tuple[int, int, int]]:
        """(least length, greatest length, documents) from the first to the last bucket that is not empty."""
        used = np.flatnonzero(self.histogram)
        for k in range(int(used[0]), int(used[-1]) + 1) if len(used) else ():
            yield 1 << (k - 1) if k else 0, (1 << k) - 1, int(self.histogram[k])

    def median_bucket(self) -> tuple[int, int]:
        """Least and greatest length of the bucket that the median lies in."""
        k = int(np.searchsorted(np.cumsum(self.histogram), (self.documents + 1) // 2))
        return 1 << (k - 1) if k else 0, (1 << k) - 1


def count_lengths(dataset: IndexedDataset, statistics: LengthStatistics) -> None:
    """Add a shard's documents, a piece at a time. Raises DataError for entries that make no sense."""
    for begin in range(0, dataset.num_documents, _COUNTED_AT_A_TIME):
        statistics.add(dataset.document_lengths(begin, min(begin + _COUNTED_AT_A_TIME, dataset.num_documents)))


def verify_shard(shard: FoundShard, vocab_size: int | None = None, progress: Progress | None = None) -> list[str]:
    """What is wrong with a shard, as messages: the first fault of its index or tokens (vocab_size, else its
    manifest's), and everything that its manifest says otherwise. Reads both files once; OSError is a message too."""
    if vocab_size is None and shard.manifest:
        vocab_size = shard.manifest.vocab_size
    facts: dict[str, str | int] = {}
    problems = []
    try:
        dataset = IndexedDataset(shard.prefix)
        facts |= {"dtype": str(dataset.dtype), "tokens": dataset.num_tokens, "documents": dataset.num_documents}
        facts |= asdict(dataset.verify(vocab_size, progress))
    except (DataError, OSError) as error:
        problems.append(str(error))
    for name, found in facts.items() if shard.entry else ():
        expected = getattr(shard.entry, name)
        if expected is not None and found != expected:
            problems.append(
                f"{shard.prefix}: {name} is {found}, expected {expected} as its manifest lists: copy the shard again, "
                "or write the manifest again if the shard was replaced on purpose"
            )
    return problems


def sample_texts(
    dataset: IndexedDataset, tokenizer: Tokenizer, samples: int, tokens: int = 64
) -> Iterator[tuple[int, str]]:
    """(document, its first tokens as text) of documents spread evenly over the shard. What is not printable, line ends
    and control sequences of terminals included, is escaped."""
    count = min(samples, dataset.num_documents)
    for document in (dataset.num_documents * i // count for i in range(count)):
        yield document, printable(tokenizer.decode(dataset.document(document)[:tokens].tolist()))


def printable(text: str) -> str:
    """`text` in one line that cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def expected_bytes(shards: Sequence[FoundShard]) -> int:
    """What `verify_shard` reports for all of them; shards that cannot be opened count nothing."""
    total = 0
    for shard in shards:
        try:
            total += IndexedDataset(shard.prefix).verified_bytes
        except (DataError, OSError):
            continue
    return total

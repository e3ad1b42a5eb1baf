"""One shard task, start to end: the function that a worker process, a Ray task and a single process all call.

Where the process has several cores, three stages work at a time: a thread reads and parses, as many as there are cores
tokenize (the engines leave Python's lock), this one writes. With a process for each core they take turns: faster, in
less memory."""

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from illada_megatron.data.corpus.prefetch import Prefetcher
from illada_megatron.data.preprocessing import records
from illada_megatron.data.preprocessing.bad_places import MOST_BAD_PLACES
from illada_megatron.data.preprocessing.chunks import CHUNK_BYTES
from illada_megatron.data.preprocessing.document_encoder import DocumentEncoder, Lengths, Tokens
from illada_megatron.data.preprocessing.documents import Batch, read_batches
from illada_megatron.data.preprocessing.inputs import require_unchanged
from illada_megatron.data.preprocessing.pipeline import ahead
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.preprocessing.records import Counts, PartRecord, TaskRecord
from illada_megatron.data.preprocessing.shuffle import DocumentShuffle
from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter
from illada_megatron.data.shards.manifest import ShardEntry, file_checksum

Report = Callable[[int, int], None]
"""Told (bytes of input read, tokens made) since it was last called; may raise to end the task."""

_AHEAD = 2
_MOST_TEXT_BYTES = 16 << 20
"""Of which the tokens are not written yet, and one batch more, beside those that were read ahead: so memory does not
grow with cores, and few large documents are held at a time."""


def run_task(job: Job, task: ShardTask, encoder: DocumentEncoder, report: Report) -> TaskRecord:
    """Write the shards of `task` and, last, its record. A finished task, or part of one, is not done again.

    Raises DataError; then nothing unfinished is left under the task's names."""
    done = records.finished_task(job, task)
    if done is not None:
        return done
    parts: list[PartRecord] = []
    with closing(_encoded(job, task, encoder)) as encoded_batches:
        for number, batches in itertools.groupby(encoded_batches, key=lambda batch: batch.part):
            part = records.finished_part(job, task, number)
            if part is None:
                part = _write_part(job, task, number, encoder, batches, report)
                if task.streamed:
                    record = TaskRecord(fingerprint=job.fingerprint, parts=(part,))
                    records.write_record(records.record_path(job, task.part_name(number)), record)
            else:
                report(sum(batch.source.read_bytes for batch in batches), 0)
            parts.append(part)
    record = TaskRecord(fingerprint=job.fingerprint, parts=tuple(parts))
    records.write_record(records.record_path(job, task.name), record)
    return record


@dataclass
class _Encoded:
    """A batch and its tokens [n], lengths [documents]; None for a batch without documents."""

    part: int
    source: Batch
    tokens: tuple[Tokens, Lengths] | None


def _encoded(job: Job, task: ShardTask, encoder: DocumentEncoder) -> Generator[_Encoded, None, None]:
    def encode(numbered: tuple[int, Batch]) -> _Encoded:
        part, batch = numbered
        tokens = encoder.encode(batch.texts) if batch.texts else None
        batch.texts.clear()
        return _Encoded(part, batch, tokens)

    parts = _parts(job, task, encoder)
    if encoder.threads == 1:
        with closing(parts):
            yield from map(encode, parts)
        return
    with (
        closing(ahead(parts, _AHEAD)) as batches,
        Prefetcher(
            encode,
            batches,
            encoder.threads,
            depth=encoder.threads + 1,  # no thread waits for the one that writes
            weight=lambda numbered: numbered[1].text_bytes,
            most_weight=_MOST_TEXT_BYTES,
        ) as encoded,
    ):
        yield from encoded


def _parts(job: Job, task: ShardTask, encoder: DocumentEncoder) -> Generator[tuple[int, Batch], None, None]:
    """Batches with the number of their part. A part ends with the batch in which its input, decompressed, reaches
    the size of a shard; of finished parts there are batches without documents, for the counts of what was read."""
    part = 0
    source_bytes = 0
    finished = records.finished_part(job, task, part) is not None
    for batch in _gathered(itertools.chain.from_iterable(_reads(job, task, encoder))):
        source_bytes += batch.source_bytes
        yield part, Batch([], read_bytes=batch.read_bytes) if finished else batch
        if task.streamed and source_bytes >= job.shard_bytes:
            part += 1
            source_bytes = 0
            finished = records.finished_part(job, task, part) is not None


def _reads(job: Job, task: ShardTask, encoder: DocumentEncoder) -> Iterator[Iterator[Batch]]:
    for piece in task.pieces:
        yield read_batches(job, piece, encoder.renderer)


def _gathered(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Small batches (of small files) together, so that the tokenizer's threads have work."""
    held: Batch | None = None
    for batch in batches:
        if held is not None:
            if held.text_bytes + batch.text_bytes <= CHUNK_BYTES:
                held = held.joined(batch)
                continue
            yield held
        held = batch
    if held is not None:
        yield held


def _write_part(
    job: Job, task: ShardTask, part: int, encoder: DocumentEncoder, batches: Iterator[_Encoded], report: Report
) -> PartRecord:
    prefix = job.prefix + task.part_name(part)
    counts = _Counting(report)
    writer = IndexedDatasetWriter(prefix, job.vocab_size)
    try:
        for tokens, lengths in _shuffled(job, task, part, counts.count(batches)):
            writer.add(tokens, lengths, encoder.end_token)
        documents, num_tokens = writer.num_documents, writer.num_tokens
        for file in {piece.file for piece in task.pieces} if task.streamed else ():
            require_unchanged(file)  # a part ends in the middle of a file
        records.require_claim(job)
        if num_tokens:
            writer.finish()
    except BaseException:
        writer.abort()
        raise
    if not num_tokens:
        writer.abort()
        return PartRecord(shard=None, counts=counts.total(0, 0))
    entry = ShardEntry.model_validate(
        {
            "path": Path(prefix).name,
            "dtype": str(writer.dtype),
            "tokens": num_tokens,
            "documents": documents,
            "bin_xxh3_128": file_checksum(prefix + ".bin"),
            "idx_xxh3_128": file_checksum(prefix + ".idx"),
        }
    )
    return PartRecord(shard=entry, counts=counts.total(documents, num_tokens))


def _shuffled(
    job: Job, task: ShardTask, part: int, batches: Iterator[tuple[Tokens, Lengths]]
) -> Iterator[tuple[Tokens, Lengths]]:
    if job.shuffle_seed is None:
        yield from batches
        return
    shuffle = DocumentShuffle(job.shuffle_seed, (task.index, part), job.shuffle_buffer_bytes, job.vocab_size)
    for tokens, lengths in batches:
        yield from shuffle.add(tokens, lengths)
    yield from shuffle.finish()


class _Counting:
    """Counts batches as they pass."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._batch = Batch([])

    def count(self, batches: Iterator[_Encoded]) -> Iterator[tuple[Tokens, Lengths]]:
        for batch in batches:
            source = batch.source
            self._batch.text_bytes += source.text_bytes
            self._batch.dropped += source.dropped
            self._batch.bad += source.bad
            if len(self._batch.bad_places) < MOST_BAD_PLACES:
                self._batch.bad_places += source.bad_places
            self._report(source.read_bytes, 0 if batch.tokens is None else len(batch.tokens[0]))
            if batch.tokens is not None:
                yield batch.tokens

    def total(self, documents: int, tokens: int) -> Counts:
        return Counts(
            documents=documents,
            tokens=tokens,
            text_bytes=self._batch.text_bytes,
            dropped=dict(sorted(self._batch.dropped.items())),
            bad=dict(sorted(self._batch.bad.items())),
            bad_places=tuple(self._batch.bad_places[:MOST_BAD_PLACES]),
        )

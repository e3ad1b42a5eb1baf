"""JSON Lines -> tokens -> a shard that training reads."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from illada_megatron.data.errors import DataError
from illada_megatron.data.indexed_dataset import IndexedDatasetWriter
from illada_megatron.data.jsonl import Line, check_files, read_lines
from illada_megatron.data.tokenizer import Tokenizer

# large enough to keep the tokenizer's threads busy, small enough to show progress
_BATCH_BYTES = 4 << 20


@dataclass(frozen=True)
class PreprocessSummary:
    """What became of the input: lines = documents + empty_documents + skipped_lines + blank lines."""

    documents: int
    tokens: int
    """End-of-document tokens included."""
    text_bytes: int
    """UTF-8 bytes of the documents' text, so that nats per token can be turned into bits per byte."""
    skipped_lines: int
    empty_documents: int
    """Lines whose text is "": nothing to learn from, not written."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def megabytes_per_second(self) -> float:
        return self.text_bytes / 1e6 / self.seconds


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    text_key: str = "text",
    append_eod: bool = True,
    skip_bad_lines: bool = False,
    show_progress: bool | None = None,
) -> PreprocessSummary:
    """Tokenize the `text_key` of each line of `inputs`, in order, into `output_prefix`.bin and .idx.

    append_eod: end each document with the tokenizer's EOS.
    skip_bad_lines: leave out and count lines that are not JSON, lack the key or hold no string there; otherwise the
        first one ends the run.
    show_progress: a progress bar on stderr; None: where stderr is a terminal.

    On any error nothing is left under the output's names and an older shard stays as it was.
    Raises DataError: missing input, bad line (file:line), no documents, no EOS; OSError from the disk."""
    paths = check_files(inputs)
    if append_eod and tokenizer.eos_id is None:
        raise DataError("the tokenizer has no end-of-document token (such as </s>): pass append_eod=False, or add one")
    suffix = [tokenizer.eos_id] if append_eod and tokenizer.eos_id is not None else []
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    counts = _Counts()
    with (
        IndexedDatasetWriter(output_prefix, tokenizer.vocab_size) as writer,
        _Progress(sum(path.stat().st_size for path in paths), show_progress) as progress,
    ):
        for texts in _batches(read_lines(paths, text_key), counts, skip_bad_lines):
            documents = [ids + suffix for ids in tokenizer.encode_batch(texts)]
            lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
            tokens = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int32, count=int(lengths.sum()))
            writer.add(tokens, lengths)
            progress.update(counts.line_bytes, writer.num_tokens)
        if not writer.num_documents:
            raise DataError(
                f"{', '.join(map(str, paths))}: no documents, found {counts.empty_documents} lines with empty text and "
                f"{counts.skipped_lines} bad lines, expected at least one line with text; nothing was written"
            )
    return PreprocessSummary(
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        text_bytes=counts.text_bytes,
        skipped_lines=counts.skipped_lines,
        empty_documents=counts.empty_documents,
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Counts:
    """Of the lines read so far."""

    line_bytes: int = 0
    text_bytes: int = 0
    skipped_lines: int = 0
    empty_documents: int = 0


def _batches(lines: Iterator[Line], counts: _Counts, skip_bad_lines: bool) -> Iterator[list[str]]:
    """Texts of the good lines, about _BATCH_BYTES at a time; `counts` is kept up to date."""
    texts: list[str] = []
    batch_bytes = 0
    for line in lines:
        counts.line_bytes += line.line_bytes
        if line.problem is not None:
            if not skip_bad_lines:
                raise DataError(f"{line.problem}. Correct the line, or skip and count such lines: --skip-bad-lines")
            counts.skipped_lines += 1
        elif line.text:
            counts.text_bytes += line.text_bytes
            batch_bytes += line.text_bytes
            texts.append(line.text)
        elif line.text == "":
            counts.empty_documents += 1
        if batch_bytes >= _BATCH_BYTES:
            yield texts
            texts, batch_bytes = [], 0
    if texts:
        yield texts


class _Progress:
    """A bar over the input's bytes with the two rates that matter: how fast text goes in, how fast tokens come out."""

    def __init__(self, total_bytes: int, show: bool | None) -> None:
        console = Console(stderr=True)
        self._started = time.perf_counter()
        self._progress = Progress(
            TextColumn("preprocess"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[rates]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal if show is None else show),
        )
        self._task = self._progress.add_task("preprocess", total=total_bytes, rates="")

    def update(self, read_bytes: int, tokens: int) -> None:
        seconds = time.perf_counter() - self._started
        rates = f"{read_bytes / 1e6 / seconds:.1f} MB/s {tokens / seconds:,.0f} tokens/s"
        self._progress.update(self._task, completed=read_bytes, rates=rates)

    def __enter__(self) -> "_Progress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

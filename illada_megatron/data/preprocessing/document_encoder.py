"""Texts -> tokens, for one process."""

import itertools
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.chat_template import ChatTemplate
from illada_megatron.data.preprocessing.documents import Batch, read_batches
from illada_megatron.data.preprocessing.plan import Job, ShardTask
from illada_megatron.data.tokenizers.engine_libraries import open_ahead, open_reference
from illada_megatron.data.tokenizers.engines import choose_engine, open_engine
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from illada_megatron.data.preprocessing.chat import ChatRenderer

Tokens = np.ndarray[Any, np.dtype[np.integer[Any]]]
Lengths = np.ndarray[Any, np.dtype[np.int64]]

# the reference that the engines are compared with is slow
_SAMPLE_CHARACTERS = 100_000


class DocumentEncoder:
    """The engine of a job, and what stands behind each document."""

    def __init__(self, job: Job, threads: int, sample: ShardTask | None = None) -> None:
        """threads: that will call `encode`. sample: choose the engine that job.engine asks for by texts of this task;
        None: job.engine was chosen so before."""
        if job.chat is None:
            open_ahead(job.engine, Path(job.tokenizer_path))
        tokenizer = load_tokenizer(job.tokenizer_path)
        if tokenizer.fingerprint != job.tokenizer_sha256:
            raise DataError(
                f"{job.tokenizer_path}: has changed since the job was planned (SHA-256 {tokenizer.fingerprint}, "
                f"expected {job.tokenizer_sha256}): restart, or bring back the file"
            )
        self.threads = threads
        self.renderer: ChatRenderer | None = None
        self.engine_name = "reference"
        self.report: tuple[str, ...] = ()
        """What was chosen and why, for the user."""
        if job.chat is not None:
            # the fast engines know text only
            self._encode = open_reference(load_tokenizer(job.tokenizer_path, special_tokens=True)).encode
            self.renderer = _renderer(job.chat, tokenizer)
        else:
            self._open_engine(job, sample)
        self._bos = tokenizer.bos_id if job.prepend_bos else None
        self._eos = tokenizer.eos_id if job.append_eod else None
        self.end_token = self._eos if self.renderer is None else None
        """What the writer puts behind each document."""

    def _open_engine(self, job: Job, sample: ShardTask | None) -> None:
        if sample is None:
            engine = open_engine(job.tokenizer_path, job.engine)
        else:
            engine = choose_engine(job.tokenizer_path, job.engine, _first_texts(job, sample))
            self.report = tuple(engine.report)
        self.engine_name = engine.name
        self._encode = engine.encode

    def encode(self, texts: list[str]) -> tuple[Tokens, Lengths]:
        """Tokens [n] and lengths [documents], without `end_token`. A conversation ends with EOS (append_eod) already:
        its template may have placed it, and BOS too."""
        tokens, lengths = self._encode(texts)
        if self._bos is not None:
            starts = np.cumsum(lengths) - lengths
            lacks = np.ones(len(lengths), bool)
            if self.renderer is not None and len(tokens):
                lacks = (lengths == 0) | (tokens[np.minimum(starts, len(tokens) - 1)] != self._bos)
            tokens, lengths = np.insert(tokens, starts[lacks], self._bos), lengths + lacks
        if self._eos is None or self.renderer is None:
            return tokens, lengths
        ends = np.cumsum(lengths)
        missing = (lengths == 0) | (tokens[np.maximum(ends, 1) - 1] != self._eos)
        return np.insert(tokens, ends[missing], self._eos), lengths + missing


def _renderer(template: ChatTemplate, tokenizer: Tokenizer) -> "ChatRenderer":
    from illada_megatron.data.preprocessing.chat import ChatRenderer

    return ChatRenderer(template, tokenizer.special_names())


def _first_texts(job: Job, task: ShardTask) -> list[str]:
    """The first texts of a task, about _SAMPLE_CHARACTERS of them."""
    with closing(read_batches(job, task.pieces[0], None)) as batches:
        texts = next(batches, Batch([])).texts
    ends = itertools.accumulate(map(len, texts))
    return [text for text, end in zip(texts, ends, strict=True) if end <= _SAMPLE_CHARACTERS]

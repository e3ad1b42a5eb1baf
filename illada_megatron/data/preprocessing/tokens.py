"""Texts -> tokens with their ends, for one process."""

import functools
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.chat import ChatRenderer
from illada_megatron.data.preprocessing.plan import Job
from illada_megatron.data.tokenizer import Tokenizer, load_tokenizer

Tokens = np.ndarray[Any, np.dtype[np.int32]]
Lengths = np.ndarray[Any, np.dtype[np.int64]]


class Encoder(Protocol):
    """What the engines of illada_megatron.data.engines offer."""

    def encode(self, texts: list[str]) -> tuple[Tokens, Lengths]:
        """tokens [n] of all texts one after another, lengths [documents]."""


class TokenizerEngine:
    """The tokenizer's own library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> tuple[Tokens, Lengths]:
        documents = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        tokens = np.empty(int(lengths.sum()), dtype=np.int32)
        end = 0
        for document in documents:
            start, end = end, end + len(document)
            tokens[start:end] = document
        return tokens, lengths


class DocumentEncoder:
    """The engine of a job, and the EOS behind each document."""

    def __init__(self, job: Job) -> None:
        tokenizer = load_tokenizer(job.tokenizer_path)
        if tokenizer.fingerprint != job.tokenizer_sha256:
            raise DataError(
                f"{job.tokenizer_path}: has changed since the job was planned (SHA-256 {tokenizer.fingerprint}, "
                f"expected {job.tokenizer_sha256}): restart, or bring back the file"
            )
        self.vocab_size = tokenizer.vocab_size
        self.renderer: ChatRenderer | None = None
        if job.chat is not None:
            self._encoder: Encoder = TokenizerEngine(load_tokenizer(job.tokenizer_path, special_tokens=True))
            self.renderer = ChatRenderer(job.chat, tokenizer.special_names())
        else:
            self._encoder = make_engine(job)
        self._eos = tokenizer.eos_id if job.append_eod else None

    def encode(self, texts: list[str]) -> tuple[Tokens, Lengths]:
        """Each document ends with EOS (append_eod), once: a chat template may have placed it already."""
        tokens, lengths = self._encoder.encode(texts)
        if self._eos is None:
            return tokens, lengths
        ends = np.cumsum(lengths)
        if self.renderer is None:
            return np.insert(tokens, ends, self._eos), lengths + 1
        missing = (lengths == 0) | (tokens[np.maximum(ends, 1) - 1] != self._eos)
        return np.insert(tokens, ends[missing], self._eos), lengths + missing


def make_engine(job: Job) -> Encoder:
    return TokenizerEngine(load_tokenizer(Path(job.tokenizer_path)))


@functools.lru_cache(maxsize=1)
def encoder_of(job_json: str) -> DocumentEncoder:
    """The encoder of a job, made once in a process."""
    return DocumentEncoder(Job.model_validate_json(job_json))

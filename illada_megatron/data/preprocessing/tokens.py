"""Texts -> tokens with their ends, for one process."""

from typing import Any

import numpy as np

from illada_megatron.data.engine_libraries import open_reference
from illada_megatron.data.engines import Engine, open_engine
from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.chat import ChatRenderer
from illada_megatron.data.preprocessing.plan import Job
from illada_megatron.data.tokenizer import load_tokenizer

Tokens = np.ndarray[Any, np.dtype[np.int32]]
Lengths = np.ndarray[Any, np.dtype[np.int64]]


class DocumentEncoder:
    """The engine of a job, and the EOS behind each document."""

    def __init__(self, job: Job, threads: int, engine: Engine | None = None) -> None:
        """threads: of the engine; engine: the one of `job`, if it is open already."""
        tokenizer = load_tokenizer(job.tokenizer_path)
        if tokenizer.fingerprint != job.tokenizer_sha256:
            raise DataError(
                f"{job.tokenizer_path}: has changed since the job was planned (SHA-256 {tokenizer.fingerprint}, "
                f"expected {job.tokenizer_sha256}): restart, or bring back the file"
            )
        self.vocab_size = tokenizer.vocab_size
        self.renderer: ChatRenderer | None = None
        if job.chat is not None:
            # the fast engines know text only
            self._encode = open_reference(load_tokenizer(job.tokenizer_path, special_tokens=True)).encode
            self.renderer = ChatRenderer(job.chat, tokenizer.special_names())
        else:
            self._encode = (engine or open_engine(job.tokenizer_path, job.engine, threads)).encode
        self._eos = tokenizer.eos_id if job.append_eod else None

    def encode(self, texts: list[str]) -> tuple[Tokens, Lengths]:
        """Each document ends with EOS (append_eod), once: a chat template may have placed it already."""
        tokens, lengths = self._encode(texts)
        if self._eos is None:
            return tokens, lengths
        ends = np.cumsum(lengths)
        if self.renderer is None:
            return np.insert(tokens, ends, self._eos), lengths + 1
        missing = (lengths == 0) | (tokens[np.maximum(ends, 1) - 1] != self._eos)
        return np.insert(tokens, ends[missing], self._eos), lengths + missing

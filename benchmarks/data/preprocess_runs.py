"""What benchmarks/data/preprocess.py runs in processes of their own: the peer, and an engine with nothing around it.

    python -m benchmarks.data.preprocess_runs peer INPUT.jsonl TOKENIZER OUTPUT_PREFIX WORKERS
    python -m benchmarks.data.preprocess_runs engine INPUT.jsonl TOKENIZER ENGINE_NAME THREADS

Each prints one line of JSON; seconds do not count starting up."""

import itertools
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

_CHUNK_LINES = 32
_BATCH_CHARACTERS = 4 << 20


class Encoder:
    """A line of JSON to ids, as in Megatron's tools/preprocess_data.py: one document at a time, in each process."""

    def __init__(self, tokenizer: str) -> None:
        self._path = tokenizer

    def initialize(self) -> None:
        Encoder.ids = staticmethod(_tokenize_function(self._path))  # type: ignore[attr-defined]

    def encode(self, line: str) -> tuple[list[int], int]:
        text = json.loads(line)["text"]
        ids, eod = Encoder.ids(text)  # type: ignore[attr-defined]
        if ids:
            ids.append(eod)
        return ids, len(text.encode())


def _tokenize_function(path: str) -> Callable[[str], tuple[list[int], int]]:
    if path.endswith(".model"):
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=path)
        return lambda text: (processor.encode_as_ids(text), processor.eos_id())
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=path)
    eod = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    # split_special_tokens: special tokens in the text are text, as with us
    return lambda text: (tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], eod)


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def run_peer(input_path: str, tokenizer: str, output_prefix: str, workers: str) -> dict[str, float]:
    """Megatron's way, with megatron-core's own builder."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = 32000
    encoder = Encoder(tokenizer)
    encoder.initialize()  # before the pool, as a warm start: the children take it over
    started, started_cpu = time.perf_counter(), cpu_seconds()
    builder = IndexedDatasetBuilder(f"{output_prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    text_bytes = tokens = documents = 0
    with Path(input_path).open(encoding="utf-8") as stream, multiprocessing.Pool(int(workers)) as pool:
        for ids, size in pool.imap(encoder.encode, stream, _CHUNK_LINES):
            builder.add_document(ids, [len(ids)])
            text_bytes, tokens, documents = text_bytes + size, tokens + len(ids), documents + 1
        builder.finalize(f"{output_prefix}.idx")
        seconds = time.perf_counter() - started
        pool.close()
        pool.join()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - started_cpu,
        "text_bytes": text_bytes,
        "tokens": tokens,
        "documents": documents,
    }


def run_engine(input_path: str, tokenizer: str, name: str, threads: str) -> dict[str, float]:
    """The library alone, on threads of its own, as its makers mean it: texts in memory, no audit, ids thrown away."""
    os.environ["RAYON_NUM_THREADS"] = os.environ["FASTOKENS_BPE_THREADS"] = threads
    from illada_megatron.data.tokenizers.engine_libraries import open_library

    if name == "gigatoken":
        import gigatoken

        encode_batch = gigatoken.Tokenizer.encode_batch
        gigatoken.Tokenizer.encode_batch = lambda self, texts, **_: encode_batch(self, texts, parallel=True)
    with Path(input_path).open(encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    library = open_library(name, Path(tokenizer))
    places = np.cumsum([len(text) for text in texts]) // _BATCH_CHARACTERS
    edges = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), len(texts)]
    started, started_cpu = time.perf_counter(), cpu_seconds()
    for start, end in itertools.pairwise(edges):
        library.encode(texts[start:end])
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - started_cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "text_bytes": sum(len(text.encode()) for text in texts)}


if __name__ == "__main__":
    print(json.dumps({"peer": run_peer, "engine": run_engine}[sys.argv[1]](*sys.argv[2:])))

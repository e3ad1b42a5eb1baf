"""Preprocessing end to end: JSONL files of the machine's own text to finished shards, beside the usual way.

    python -m benchmarks.data.preprocess --rounds 2

Peer: Megatron's tools/preprocess_data.py as a loop with megatron-core's own classes (preprocess_runs.py), on a part of
the file. Ours: `illada preprocess`, from the start of Python to its end; the comparison of the tokenizer's engines was
made in a run before. Engine: the library alone, texts in memory. Ours and the engine take several turns a
round: a second is at the mercy of whatever else the machine does. Wrong ids count as failure. The last line is one line
of JSON."""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from benchmarks.data.machine_text import write_corpus
from benchmarks.data.preprocess_runs import cpu_seconds
from benchmarks.measuring.machine import cpu_model

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
TURNS = 5
TIMES_PEER = {"bpe": 12.0, "sentencepiece": 2.5}
PEAK_MB = 600.0
LARGE_MB = 800
"""From here on starting up costs little."""
_SAMPLE_SECONDS = 0.1
SPACE_SIGN = "\u2581"
LARGE_DOCUMENT_CHARACTERS = 60_000_000
"""62 MB in UTF-8, about."""


@dataclass
class Figures:
    """Of one tokenizer; a list has a value for each round, the median of its turns."""

    ours_mb_s: list[float] = field(default_factory=list)
    peer_mb_s: list[float] = field(default_factory=list)
    engine_mb_s: list[float] = field(default_factory=list)
    ours_mb_per_cpu_s: list[float] = field(default_factory=list)
    peer_mb_per_cpu_s: list[float] = field(default_factory=list)
    engine_mb_per_cpu_s: list[float] = field(default_factory=list)
    shares_of_engine: list[float] = field(default_factory=list)
    """One for each turn of ours and the engine."""
    peak_mb: dict[str, float] = field(default_factory=dict)
    """Of the run as it is timed, with a shuffle, and on a file with a document of 62 MB."""
    first_run_seconds: float = 0.0
    """With the comparison of engines, which later runs remember."""
    engine: str = ""
    tokens: int = 0
    documents_compared: int = 0
    documents_with_space_sign: int = 0
    documents_that_differ: int = 0

    def times_peer(self) -> float:
        """What else the machine does in a round hits both."""
        return statistics.median(ours / peer for ours, peer in zip(self.ours_mb_s, self.peer_mb_s, strict=True))

    def share_of_engine(self) -> float:
        return statistics.median(self.shares_of_engine)


@dataclass(frozen=True)
class Case:
    """A tokenizer and the files it is tried on."""

    tokenizer_kind: str
    megabytes: int
    tokenizer: Path
    corpus: Path
    part: Path
    large: Path
    text_bytes: int
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.tokenizer_kind}_{self.megabytes}_mb"

    @property
    def least_share_of_engine(self) -> float:
        if self.tokenizer_kind == "sentencepiece":
            return 0.85
        return 0.5 if self.megabytes >= LARGE_MB else 0.4


def main(
    work_dir: Annotated[Path, typer.Option(help="Corpus, tokenizers and shards; kept for the next time.")] = Path(
        "/tmp/illada-preprocess"
    ),
    sizes_mb: Annotated[list[int] | None, typer.Option("--size-mb", help="Text of a file; default: 200, 800.")] = None,
    part_mb: Annotated[int, typer.Option(help="Of it for the peer.")] = 40,
    vocab_size: Annotated[int, typer.Option(help="Of both tokenizers.")] = 32_000,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Measure, print a table and one line of JSON."""
    work_dir.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(work_dir / "cache")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # nobody compiles the package at each start
    corpora = {size: _corpora(work_dir, size, part_mb) for size in sizes_mb or (200, LARGE_MB)}
    tokenizers = _tokenizers(work_dir, corpora[max(corpora)][0], vocab_size)
    cases = [
        Case(kind, size, path, *files, work_dir) for size, files in corpora.items() for kind, path in tokenizers.items()
    ]
    figures = {case.name: Figures() for case in cases}
    for turn in range(rounds):
        for case in cases:
            _round(case, figures[case.name])
            print(f"round {turn + 1} {case.name}: {_line(figures[case.name])}", flush=True)
    for case in cases:
        _compare_ids(case, figures[case.name])
        print(f"{case.name}: {_line(figures[case.name])}")
    print(json.dumps(_result(cases, figures, {"part_mb": part_mb, "vocab_size": vocab_size})))


def _corpora(work_dir: Path, corpus_mb: int, part_mb: int) -> tuple[Path, Path, Path, int]:
    """The file, its first `part_mb`, these with a document of 62 MB behind them, and the bytes of text in the file."""
    corpus, part = work_dir / f"text_{corpus_mb}.jsonl", work_dir / f"text_{corpus_mb}_part_{part_mb}.jsonl"
    large = work_dir / f"text_{corpus_mb}_large_document.jsonl"
    if not corpus.exists():
        write_corpus(corpus, corpus_mb * 10**6)
    text_bytes = 0
    with corpus.open("rb") as stream, part.open("wb") as part_stream:
        for line in stream:
            if text_bytes < part_mb * 10**6:
                part_stream.write(line)
            text_bytes += len(json.loads(line)["text"].encode())
    text = ""
    with part.open(encoding="utf-8") as stream:
        for line in itertools.cycle(stream.readlines()):
            text += json.loads(line)["text"]
            if len(text) >= LARGE_DOCUMENT_CHARACTERS:
                break
    document = json.dumps({"text": text[:LARGE_DOCUMENT_CHARACTERS]})
    large.write_bytes(part.read_bytes() + document.encode() + b"\n")
    return corpus, part, large, text_bytes


def _tokenizers(work_dir: Path, corpus: Path, vocab_size: int) -> dict[str, Path]:
    """Byte-level BPE with the regex of Llama 3, and SentencePiece BPE."""
    names = {"bpe": f"bpe_{vocab_size}.json", "sentencepiece": f"sentencepiece_{vocab_size}.model"}
    paths = {name: work_dir / file for name, file in names.items()}
    if all(path.exists() for path in paths.values()):
        return paths
    training = work_dir / "training.jsonl"
    with corpus.open("rb") as stream, training.open("wb") as output:
        lines = (line for number, line in enumerate(stream) if number % 7 == 0)
        while output.tell() < 25_000_000 and (line := next(lines, b"")):
            output.write(line)
    code = "import sys; from benchmarks.data import preprocess_tokenizers; preprocess_tokenizers.train(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, training, *paths.values(), str(vocab_size)], check=True, cwd=ROOT)
    return paths


def _round(case: Case, figures: Figures) -> None:
    """The peer once, then ours and the engine in turns."""
    script = [sys.executable, "-m", "benchmarks.data.preprocess_runs"]
    peer_prefix, our_prefix = case.directory / f"peer_{case.name}", case.directory / f"ours_{case.name}"
    peer = _json(_run([*script, "peer", case.part, case.tokenizer, peer_prefix, WORKERS])[0])
    figures.peer_mb_s.append(peer["text_bytes"] / 1e6 / peer["seconds"])
    figures.peer_mb_per_cpu_s.append(peer["text_bytes"] / 1e6 / peer["cpu_seconds"])

    command = [sys.executable, "-m", "illada_megatron", "preprocess", case.corpus, "--output-prefix", our_prefix]
    command += ["--tokenizer", case.tokenizer, "--workers", WORKERS]
    if not figures.peak_mb:  # in runs of their own: adding up the pages of processes holds them up
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
        _remove(our_prefix)
        figures.first_run_seconds = _run(command)[2]
        large = [case.large if part == case.corpus else part for part in command]
        for name, one in (("", command), ("shuffle", [*command, "--shuffle-seed", 1]), ("62 MB document", large)):
            _remove(our_prefix)
            figures.peak_mb[name] = _run(one, sample_memory=True)[1]
    turns = [_turn(case, command, our_prefix, figures) for _ in range(TURNS)]
    figures.shares_of_engine += [ours_mb_s / engine_mb_s for ours_mb_s, _, engine_mb_s, _ in turns]
    lists = (figures.ours_mb_s, figures.ours_mb_per_cpu_s, figures.engine_mb_s, figures.engine_mb_per_cpu_s)
    for values, of_turns in zip(lists, zip(*turns, strict=True), strict=True):
        values.append(statistics.median(of_turns))


def _turn(case: Case, command: list[Any], our_prefix: Path, figures: Figures) -> tuple[float, float, float, float]:
    """Ours, then the engine: MB/s and MB per CPU second of each."""
    _remove(our_prefix)
    started_cpu = cpu_seconds()
    output, _, seconds = _run(command)
    cpu = cpu_seconds() - started_cpu
    figures.engine = next(
        line.split()[2].rstrip(":") for line in output.splitlines() if " ids on " in line or "reference:" in line
    )
    script = [sys.executable, "-m", "benchmarks.data.preprocess_runs"]
    bare = _json(_run([*script, "engine", case.corpus, case.tokenizer, figures.engine, WORKERS])[0])
    megabytes, bare_megabytes = case.text_bytes / 1e6, bare["text_bytes"] / 1e6
    return megabytes / seconds, megabytes / cpu, bare_megabytes / bare["seconds"], bare_megabytes / bare["cpu_seconds"]


def _remove(prefix: Path) -> None:
    """What the run before has written: the file system frees it outside of the time."""
    for path in prefix.parent.glob(f"{prefix.name}[._]*"):
        path.unlink()


def _json(output: str) -> dict[str, float]:
    return json.loads(output.strip().splitlines()[-1])


def _run(command: list[Any], sample_memory: bool = False) -> tuple[str, float, float]:
    """Output of both streams, the peak of the memory of the process and its children in MB (PSS: shared pages count
    once; 0 unless sample_memory), and the seconds from its start to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    environment.pop("RAYON_NUM_THREADS", None)
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    peak = [0.0]
    sampler = threading.Thread(target=_sample_memory, args=(process, peak))
    if sample_memory:
        sampler.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    if sample_memory:
        sampler.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}: {output[-3000:]}")
    return output, peak[0] / 1e6, seconds


def _sample_memory(process: "subprocess.Popen[str]", peak: list[float]) -> None:
    while process.poll() is None:
        total = 0
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.Error:
            tree = []
        for member in tree:
            try:
                total += member.memory_full_info().pss
            except psutil.Error:
                continue  # it has ended
        peak[0] = max(peak[0], total)
        time.sleep(_SAMPLE_SECONDS)


def _compare_ids(case: Case, figures: Figures) -> None:
    """The peer's shard and the first documents of ours, both read by megatron-core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    manifest = json.loads((case.directory / f"ours_{case.name}.manifest.json").read_text())
    figures.tokens = sum(shard["tokens"] for shard in manifest["shards"])
    first = sorted(path for path in case.directory.glob(f"ours_{case.name}*.idx"))[0]
    ours = IndexedDataset(str(first.with_suffix("")))
    peers = IndexedDataset(str(case.directory / f"peer_{case.name}"))
    with case.part.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            figures.documents_compared += 1
            if case.tokenizer.suffix == ".model" and SPACE_SIGN in json.loads(line)["text"]:
                figures.documents_with_space_sign += 1  # which SentencePiece alone turns into a space
            elif not np.array_equal(ours[number], peers[number]):
                figures.documents_that_differ += 1


def _line(figures: Figures) -> str:
    shown = ", ".join(
        f"{name} {', '.join(f'{value:.1f}' for value in values)}"
        for name, values in [
            ("peer MB/s", figures.peer_mb_s),
            ("ours MB/s", figures.ours_mb_s),
            (f"{figures.engine} alone MB/s", figures.engine_mb_s),
            ("MB per CPU second: peer", figures.peer_mb_per_cpu_s),
            ("ours", figures.ours_mb_per_cpu_s),
            ("engine", figures.engine_mb_per_cpu_s),
            ("peak MB", list(figures.peak_mb.values())),
            ("first run s", [figures.first_run_seconds]),
        ]
    )
    return (
        f"{shown}; {figures.times_peer():.1f} times the peer, {figures.share_of_engine():.2f} of the engine; "
        f"{figures.documents_that_differ} of {figures.documents_compared} documents differ"
    )


def _result(cases: list[Case], figures: dict[str, Figures], sizes: dict[str, int]) -> dict[str, Any]:
    shown = {
        name: {**asdict(values), "times_peer": values.times_peer(), "share_of_engine": values.share_of_engine()}
        for name, values in figures.items()
    }
    found = [(case, figures[case.name]) for case in cases]
    holds = all(
        values.times_peer() >= TIMES_PEER[case.tokenizer_kind]
        and values.share_of_engine() >= case.least_share_of_engine
        and max(values.peak_mb.values()) < PEAK_MB
        and values.documents_compared > 0
        and values.documents_that_differ == 0
        for case, values in found
    )
    goals = {
        case.name: {
            "times_peer": TIMES_PEER[case.tokenizer_kind],
            "share_of_engine": case.least_share_of_engine,
            "peak_mb": PEAK_MB,
        }
        for case in cases
    }
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "load": os.getloadavg(), "python": sys.version.split()[0]}
    report = {"benchmark": "preprocess", **sizes, "workers": WORKERS, "tokenizers": shown, "goals": goals}
    return {**report, "machine": machine, "holds": holds}


if __name__ == "__main__":
    typer.run(main)

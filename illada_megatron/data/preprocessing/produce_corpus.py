"""Text -> tokens -> shards that training reads, and the manifest that lists them."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing import records
from illada_megatron.data.preprocessing.bad_places import told
from illada_megatron.data.preprocessing.chat_template import load_chat_template
from illada_megatron.data.preprocessing.claim import claimed_prefix, remove_records
from illada_megatron.data.preprocessing.document_encoder import DocumentEncoder
from illada_megatron.data.preprocessing.inputs import Format, InputFile, described, find_inputs
from illada_megatron.data.preprocessing.outputs import Outputs
from illada_megatron.data.preprocessing.plan import Job, ShardTask, fingerprinted, plan_tasks
from illada_megatron.data.preprocessing.progress import ProgressBar
from illada_megatron.data.preprocessing.records import Counts, JobRecord, TaskRecord
from illada_megatron.data.preprocessing.worker_pool import WorkerPool, run_here
from illada_megatron.data.shards.manifest import Manifest, write_manifest
from illada_megatron.data.tokenizers.finding import find_tokenizer
from illada_megatron.data.tokenizers.fitting import check_mask, without_mask
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer
from illada_megatron.system.terminal import say


@dataclass(frozen=True)
class PreprocessOptions:
    """How a corpus is made. All but `skip_bad_lines` and the last group decide its bytes."""

    input_format: Format | Literal["auto"] = "auto"
    text_key: str | None = None
    """Key or column of the text; None: "text", or "messages" for conversations."""
    append_eod: bool = True
    prepend_bos: bool = False
    """End each document with the tokenizer's EOS."""
    skip_bad_lines: bool = False
    """Leave out and count what is not JSON, lacks the key or holds no string there; else the first one ends the run."""
    chat: bool = False
    """The key holds conversations: [{"role": ..., "content": ...}, ...]."""
    chat_template: Path | None = None
    """Jinja file; None: the chat_template of the tokenizer_config.json beside the tokenizer."""
    max_document_mb: float = 64
    """Longer lines and documents are dropped, without being held in memory; longer text files are cut."""
    shard_mb: float = 512
    """Of input for each shard."""
    shuffle_seed: int | None = None
    """None: documents stay in the order of the input."""
    shuffle_buffer_mb: float = 64
    """Of tokens, for each worker; documents are shuffled within about that much."""

    workers: int | None = None
    """Processes; None: one for each core that this process may use."""
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    tokenizer_engine: str = "auto"
    overwrite: bool = False
    """Remove what is there under the output prefix."""
    show_progress: bool | None = None
    """A progress bar on stderr; None: where stderr is a terminal."""
    log_interval_seconds: float = 30
    """Where there is no bar, a line on stderr that often; 0: none."""


@dataclass(frozen=True)
class PreprocessSummary:
    """What became of the input."""

    manifest: Path
    shards: int
    counts: Counts
    seconds: float
    """Of this run."""
    read_bytes: int
    """By this run."""
    resumed_tasks: int
    """Finished by runs before this one."""
    tasks: int
    left_out: str
    """Files of directories and globs that were not read, by how their names end."""

    @property
    def megabytes_per_second(self) -> float:
        return self.read_bytes / 1e6 / self.seconds

    def bad_places(self) -> list[str]:
        """Where the first bad lines are, as file:line. Raises OSError."""
        return told(self.counts.bad_places)

    @property
    def was_finished(self) -> bool:
        """There was nothing left to do."""
        return self.resumed_tasks == self.tasks


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    options: PreprocessOptions | None = None,
) -> PreprocessSummary:
    """Tokenize `inputs` (files, globs, directories; JSONL, Parquet, text) into `output_prefix`.bin/.idx or, of more
    than one shard, `output_prefix`_00000.bin/.idx and so on, and `output_prefix`.manifest.json.

    tokenizer_path: as `find_tokenizer` takes it: a file, a directory, a name on the Hugging Face hub.

    A run that was stopped in any way goes on where it was when it is started again with the same inputs and options;
    the result is the same bytes, whatever the number of workers or machines.

    Raises DataError: missing or damaged input, bad line (file:line), no documents, no EOS, a prefix that another job
    has used, a worker that died; OSError from the disk. Shards that are finished by then are kept; of others nothing
    is left."""
    options = options or PreprocessOptions()
    started = time.perf_counter()
    job, tasks, left_out = plan_job(inputs, output_prefix, tokenizer_path, options)
    Path(job.prefix).parent.mkdir(parents=True, exist_ok=True)
    resumed, read_bytes = len(tasks), 0
    with claimed_prefix(job, tasks, options.overwrite) as claim:
        if claim.finished is None:
            done = _done_before(job, tasks)
            resumed = len(done)
            read_bytes = _run(job, tasks, done, options, left_out)
            claim = _publish(job, claim, [done[task.index] for task in tasks])
        remove_records(job.prefix)
    return PreprocessSummary(
        manifest=records.manifest_path(job.prefix),
        shards=claim.shards,
        counts=claim.finished or Counts(),
        seconds=time.perf_counter() - started,
        read_bytes=read_bytes,
        resumed_tasks=resumed,
        tasks=len(tasks),
        left_out=left_out,
    )


def plan_job(
    inputs: Sequence[str | Path], output_prefix: str | Path, tokenizer_path: str | Path, options: PreprocessOptions
) -> tuple[Job, list[ShardTask], str]:
    """What is to be done, and what is left out of the input; nothing is written. Says on stderr where the tokenizer
    has no mask."""
    found = find_inputs(inputs, options.input_format)
    tokenizer_path = find_tokenizer(tokenizer_path, "--tokenizer")
    tokenizer = load_tokenizer(tokenizer_path)
    check_mask(tokenizer, tokenizer_path)
    if tokenizer.mask_id is None:
        say(f"warning: {without_mask(tokenizer, tokenizer_path)}", error=True)
    if options.append_eod and tokenizer.eos_id is None:
        raise DataError(
            f"{tokenizer_path}: the tokenizer has no end-of-document token (such as </s>): pass --no-append-eod, or "
            "add one"
        )
    if options.prepend_bos and tokenizer.bos_id is None:
        raise DataError(
            f"{tokenizer_path}: the tokenizer has no token for a beginning (such as <s>): leave --prepend-bos out, or "
            "add one"
        )
    for name in ("max_document_mb", "shard_mb", "shuffle_buffer_mb"):
        if getattr(options, name) <= 0:
            raise DataError(f"{name} is {getattr(options, name)}, expected more than 0")
    if options.workers is not None and options.workers < 1:
        raise DataError(f"workers is {options.workers}, expected 1 or more")
    chat = load_chat_template(tokenizer_path, options.chat_template) if options.chat else None
    job = Job(
        prefix=os.path.abspath(output_prefix),  # noqa: PTH100 (a prefix is no path: it may end in a dot)
        tokenizer_path=str(tokenizer_path.absolute()),
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        engine=options.tokenizer_engine,
        text_key=options.text_key or ("messages" if options.chat else "text"),
        chat=chat,
        append_eod=options.append_eod,
        prepend_bos=options.prepend_bos,
        skip_bad_lines=options.skip_bad_lines,
        max_document_bytes=int(options.max_document_mb * 1e6),
        shard_bytes=max(1, int(options.shard_mb * 1e6)),
        shuffle_seed=options.shuffle_seed,
        shuffle_buffer_bytes=int(options.shuffle_buffer_mb * 1e6),
    )
    _require_other_files(job, found.files)
    return fingerprinted(job, found.files), plan_tasks(found.files, job.shard_bytes), described(found.left_out)


def _require_other_files(job: Job, files: Sequence[InputFile]) -> None:
    """With --overwrite the job would remove its own input."""
    written = {str(output.path) for output in Outputs(job.prefix).own}
    for file in files:
        if file.path in written:
            raise DataError(f"{file.path}: is both input and, as a file of {job.prefix}, output: choose another prefix")


def _done_before(job: Job, tasks: Sequence[ShardTask]) -> dict[int, TaskRecord]:
    found = ((task.index, records.finished_task(job, task)) for task in tasks)
    return {index: record for index, record in found if record is not None}


def _run(
    job: Job, tasks: Sequence[ShardTask], done: dict[int, TaskRecord], options: PreprocessOptions, left_out: str
) -> int:
    """Do what is not done, and add it to `done`. Returns the bytes read."""
    waiting = [task for task in tasks if task.index not in done]
    total, left = (sum(task.size_bytes for task in some) for some in (tasks, waiting))
    bar = ProgressBar(total, total - left, options.show_progress, options.log_interval_seconds)
    with _results(job, waiting, options, bar) as results, bar:
        if left_out:
            bar.print(f"left out of directories and globs: {left_out}")
        for task, record in results:
            done[task.index] = record
        return bar.read_bytes


@contextmanager
def _results(
    job: Job, tasks: Sequence[ShardTask], options: PreprocessOptions, bar: ProgressBar
) -> Iterator[Iterable[tuple[ShardTask, TaskRecord]]]:
    """Whatever is asked for does the tasks; the tokenizer's engine is chosen once, here."""
    if not tasks:
        yield ()
        return
    # what this process may run on: a step of a batch system has a few of a large node's
    cores = len(os.sched_getaffinity(0))
    workers = min(len(tasks), options.workers or cores)
    threads = 1 if options.engine == "ray" else max(1, cores // workers)
    if options.engine == "local" and workers > 1:
        with WorkerPool(job, tasks, workers, threads, bar.print) as pool:
            yield pool.run(bar.update)
        return
    encoder = DocumentEncoder(job, threads, sample=tasks[0])
    bar.print(*encoder.report)
    if options.engine == "local":
        yield run_here(job, tasks, encoder, bar.update)
        return
    from illada_megatron.data.preprocessing.ray_engine import run_ray

    job = job.model_copy(update={"engine": encoder.engine_name})
    yield run_ray(job, tasks, options.ray_address, bar.update)


def _publish(job: Job, claim: JobRecord, done: Sequence[TaskRecord]) -> JobRecord:
    """The manifest, then the job's own record; first, whether what they will say is so."""
    parts = [part for record in done for part in record.parts]
    counts = sum((part.counts for part in parts), Counts())
    shards = tuple(part.shard for part in parts if part.shard is not None)
    if not shards:
        remove_records(job.prefix)
        raise DataError(f"no documents: {_reasons(counts)}, expected at least one with text in it; nothing was written")
    manifest = Manifest(vocab_size=job.vocab_size, tokenizer_sha256=job.tokenizer_sha256, shards=shards)
    records.require_claim(job)
    for shard in shards:
        if (problem := records.shard_problem(Path(job.prefix).parent, shard)) is not None:
            raise DataError(
                f"{problem}, though this run has written it or found it whole: another process has changed it; run the "
                "same command again"
            )
    write_manifest(manifest, records.manifest_path(job.prefix), replace=False)
    record = claim.model_copy(update={"finished": counts, "shards": len(shards)})
    records.write_record(records.job_path(job.prefix), record)
    return record


def _reasons(counts: Counts) -> str:
    reasons = {**counts.dropped, **counts.bad}
    return "found only " + ", ".join(f"{count} {reason}" for reason, count in reasons.items()) if reasons else "none"

"""`illada preprocess`, and tools/preprocess_data.py under Megatron's option names: one command."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.finding import find_tokenizer
from illada_megatron.system.terminal import counted, say

if TYPE_CHECKING:
    from illada_megatron.data.preprocessing.produce_corpus import PreprocessSummary

# typer looks whether a path can be read and, whatever the system answers, calls it the user's mistake: a disk that may
# come back is none
_TOLD_HERE = False
_WITHOUT_THREADS = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def preprocess(
    output_prefix: Annotated[
        Path, typer.Option(help="Writes PREFIX.manifest.json and PREFIX[_00000].bin/.idx.", readable=_TOLD_HERE)
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "--tokenizer-model",
            help="A SentencePiece .model or Hugging Face tokenizer.json, a directory with one, or org/name on the hub.",
        ),
    ] = None,
    inputs: Annotated[
        list[Path] | None, typer.Argument(help="Files, globs or directories, in this order.", readable=_TOLD_HERE)
    ] = None,
    input: Annotated[list[Path] | None, typer.Option(help="The same as INPUTS.", readable=_TOLD_HERE)] = None,
    vocab_file: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --tokenizer: vocab.json of a byte-level BPE; PREFIX.tokenizer.json is written.",
            readable=_TOLD_HERE,
        ),
    ] = None,
    merge_file: Annotated[Path | None, typer.Option(help="Its merges.txt.", readable=_TOLD_HERE)] = None,
    tokenizer_type: Annotated[str | None, typer.Option(help="Megatron's name for it; checked, not needed.")] = None,
    json_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--json-keys",
            "--json-key",
            help="Key or column of the text (default: text; messages with --chat). Several: a corpus each, "
            "PREFIX_KEY_document.",
        ),
    ] = None,
    input_format: Annotated[
        Literal["auto", "jsonl", "text", "parquet"], typer.Option(help="auto: by suffix; also .gz and .zst.")
    ] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="The key holds conversations, for SFT.")] = False,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="Jinja file; default: of tokenizer_config.json beside the tokenizer.", readable=_TOLD_HERE),
    ] = None,
    append_eod: Annotated[bool, typer.Option(help="End each document with EOS.")] = True,
    prepend_bos: Annotated[
        bool, typer.Option(help="Begin each document with BOS, as a prompt to score begins.")
    ] = False,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out and count what cannot be used, instead of stopping.")
    ] = False,
    max_document_mb: Annotated[float, typer.Option(help="Longer documents are dropped.")] = 64,
    shard_mb: Annotated[float, typer.Option(help="Input for each shard.")] = 512,
    shuffle_seed: Annotated[int | None, typer.Option(help="Shuffle documents; default: input order.")] = None,
    shuffle_buffer_mb: Annotated[float, typer.Option(help="Tokens that are shuffled together.")] = 64,
    workers: Annotated[int | None, typer.Option(help="Processes; default: the cores that it may use.")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Who runs the shard tasks.")] = "local",
    ray_address: Annotated[str | None, typer.Option(help="Of a running Ray cluster, as auto.")] = None,
    tokenizer_engine: Annotated[str, typer.Option(help="Library that tokenizes; auto: the fastest that agrees.")] = (
        "auto"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove what PREFIX has now.")] = False,
    log_interval: Annotated[float, typer.Option(help="Seconds between lines on stderr where it is no terminal.")] = 30,
) -> None:
    """Tokenize text into shards that training reads (Megatron's .bin/.idx). Stopped, it continues when run again.

    `illada preprocess corpus.jsonl --output-prefix data/train --tokenizer tokenizer.model`

    `illada preprocess 'web/*.jsonl.zst' --output-prefix data/web --tokenizer tokenizer.json --shuffle-seed 1`

    Then train on `data.train_paths=[data/train.manifest.json]`.
    """
    paths = [*(inputs or []), *(input or [])]
    if not paths:
        keys_too = f"; --json-keys took {' '.join(json_keys)}: give --input FILE" if json_keys else ""
        raise DataError(f"no input: name files, globs or directories{keys_too}")
    found = _tokenizer_file(tokenizer, tokenizer_type, vocab_file, merge_file, output_prefix)
    is_chat = chat or chat_template is not None
    keys: list[str | None] = [*json_keys] if json_keys else [None]
    with _stoppable(), _process_of_its_own():
        if engine == "local" and not is_chat:
            _open_while_importing(tokenizer_engine, found)
        from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions
        from illada_megatron.data.preprocessing.produce_corpus import preprocess as run_preprocess

        for key in keys:
            prefix = output_prefix if len(keys) == 1 else Path(f"{output_prefix}_{key}_document")
            options = PreprocessOptions(
                input_format=input_format,
                text_key=key,
                append_eod=append_eod,
                prepend_bos=prepend_bos,
                skip_bad_lines=skip_bad_lines,
                chat=is_chat,
                chat_template=chat_template,
                max_document_mb=max_document_mb,
                shard_mb=shard_mb,
                shuffle_seed=shuffle_seed,
                shuffle_buffer_mb=shuffle_buffer_mb,
                workers=workers,
                engine=engine,
                ray_address=ray_address,
                tokenizer_engine=tokenizer_engine,
                overwrite=overwrite,
                log_interval_seconds=log_interval,
            )
            say(_told(run_preprocess(paths, prefix, found, options)))


def _open_while_importing(tokenizer_engine: str, tokenizer: Path) -> None:
    """Of a small run's time, a third would go by before its tokenizer is open."""
    from illada_megatron.data.tokenizers.engine_libraries import open_ahead

    open_ahead(tokenizer_engine, tokenizer)


@contextmanager
def _process_of_its_own() -> Iterator[None]:
    """As worker processes are: without looking for cycles, of which there are none among millions of objects, and
    without threads of numpy and `tokenizers`, of which there would be one for each core: with them it could not be
    forked."""
    collects = gc.isenabled()
    ours = {name: value for name, value in _WITHOUT_THREADS.items() if name not in os.environ}
    os.environ.update(ours)
    gc.disable()
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
        if collects:
            gc.enable()


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, as batch systems send it, ends the block as Ctrl-C does: workers are ended, the prefix is let go."""

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        kept = "finished shards are kept: run the same command again, without --overwrite, to continue"
        say(f"illada: stopped; {kept}", error=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _tokenizer_file(
    tokenizer: str | None, kind: str | None, vocab_file: Path | None, merge_file: Path | None, output_prefix: Path
) -> Path:
    """The tokenizer's file; of --vocab-file and --merge-file, one that is written. Raises DataError: it is not the
    --tokenizer-type that was named, or there is none."""
    if tokenizer is not None and kind is None and vocab_file is None and merge_file is None:
        return find_tokenizer(tokenizer, "--tokenizer")  # without the configuration's modules, which take 0.2 s
    from illada_megatron.config.megatron_names import BYTE_LEVEL_BPE, TOKENIZER_TYPES

    file = TOKENIZER_TYPES.get(kind, "no type of Megatron's") if kind is not None else None
    if isinstance(file, str) and file != BYTE_LEVEL_BPE:
        here = ", ".join(
            name for name, of in TOKENIZER_TYPES.items() if not isinstance(of, str) or of == BYTE_LEVEL_BPE
        )
        raise DataError(f"--tokenizer-type is {kind}: {file}; expected one of {here}")
    if vocab_file is not None and merge_file is not None:
        if tokenizer is not None or file not in (None, BYTE_LEVEL_BPE):
            other = f"--tokenizer {tokenizer}" if tokenizer is not None else f"--tokenizer-type {kind}"
            raise DataError(f"{other} and --vocab-file, --merge-file are both given: leave one of them out")
        return _made_tokenizer(vocab_file, merge_file, output_prefix)
    if file == BYTE_LEVEL_BPE or vocab_file is not None or merge_file is not None:
        raise DataError(
            f"--vocab-file is {vocab_file}, --merge-file {merge_file}: expected the vocab.json and the merges.txt of a "
            "byte-level BPE; a tokenizer.json is given as --tokenizer, without --tokenizer-type"
        )
    if tokenizer is None:
        raise DataError("no tokenizer: give --tokenizer (or --tokenizer-model), or --vocab-file and --merge-file")
    found = find_tokenizer(tokenizer, "--tokenizer")
    if isinstance(file, tuple) and found.suffix not in file:
        raise DataError(
            f"{found}: --tokenizer-type {kind} expects a file that ends in {' or '.join(file)}: leave the type out, it "
            "is known by the name"
        )
    return found


def _made_tokenizer(vocab_file: Path, merge_file: Path, output_prefix: Path) -> Path:
    from illada_megatron.data.tokenizers.byte_level import write_tokenizer_json

    path = Path(f"{output_prefix}.tokenizer.json")
    made = write_tokenizer_json(vocab_file, merge_file, path)
    say(
        f"{path}: byte-level BPE; train on it with data.tokenizer_path={path} model.vocab_size={made.vocab_size} "
        f"model.mask_token_id={made.mask_id}"
    )
    return path


def _told(summary: "PreprocessSummary") -> str:
    counts = summary.counts
    lines = [
        f"{summary.manifest}: {counted(counts.documents, 'document')}, {counted(counts.tokens, 'token')} "
        f"({counts.text_bytes / max(1, counts.tokens):.2f} bytes/token), shards: {summary.shards:,}",
        f"skipped {counted(sum(counts.bad.values()), 'bad line')}{_by_reason(counts.bad)} and "
        f"{counted(sum(counts.dropped.values()), 'document')}{_by_reason(counts.dropped)}",
    ]
    if places := summary.bad_places():
        others = sum(counts.bad.values()) - len(places)
        lines.append(f"bad lines: {', '.join(places)}{f' and {others:,} more' if others else ''}")
    if summary.left_out:
        lines.append(f"left out of directories and globs: {summary.left_out}")
    if summary.was_finished:
        lines.append("everything was finished before: nothing done")
    else:
        again = f"; {summary.resumed_tasks:,} of {summary.tasks:,} tasks were finished before"
        lines.append(
            f"{summary.read_bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s ({summary.megabytes_per_second:.1f} MB/s)"
            + (again if summary.resumed_tasks else "")
        )
    return "\n".join(lines)


def _by_reason(counts: dict[str, int]) -> str:
    return f" ({', '.join(f'{count:,} {reason}' for reason, count in counts.items())})" if counts else ""

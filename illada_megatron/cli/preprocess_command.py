"""`illada preprocess`."""

from pathlib import Path
from typing import Annotated

import typer

from illada_megatron.data.preprocess import preprocess as run_preprocess
from illada_megatron.data.tokenizer import load_tokenizer


def preprocess(
    inputs: Annotated[list[Path], typer.Argument(help="JSONL files, read in this order.")],
    output_prefix: Annotated[Path, typer.Option(help="Writes OUTPUT_PREFIX.bin and OUTPUT_PREFIX.idx.")],
    tokenizer: Annotated[Path, typer.Option(help="A SentencePiece .model or a Hugging Face tokenizer.json.")],
    json_key: Annotated[str, typer.Option(help="The key that holds the text.")] = "text",
    append_eod: Annotated[bool, typer.Option(help="End each document with EOS.")] = True,
    skip_bad_lines: Annotated[
        bool, typer.Option(help="Leave out and count lines that cannot be used, instead of stopping at the first.")
    ] = False,
) -> None:
    """Tokenize JSONL into a shard that training reads (Megatron's .bin/.idx).

    `illada preprocess corpus.jsonl --output-prefix data/corpus --tokenizer tokenizer.model`
    """
    summary = run_preprocess(
        inputs,
        output_prefix,
        load_tokenizer(tokenizer),
        text_key=json_key,
        append_eod=append_eod,
        skip_bad_lines=skip_bad_lines,
    )
    print(
        f"{output_prefix}: {summary.documents:,} documents, {summary.tokens:,} tokens "
        f"({summary.text_bytes / max(1, summary.tokens):.2f} bytes/token) in {summary.seconds:.1f} s "
        f"({summary.megabytes_per_second:.1f} MB/s); skipped {summary.skipped_lines:,} bad lines and "
        f"{summary.empty_documents:,} empty documents"
    )

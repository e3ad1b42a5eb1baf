"""JSON Lines -> .bin/.idx, under Megatron's option names; see illada_megatron.data.preprocess."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from illada_megatron.data import DataError, load_tokenizer, preprocess


def main(
    input: Annotated[list[Path], typer.Option(help="JSON Lines file; repeat the option for several")],
    output_prefix: Annotated[Path, typer.Option(help="PREFIX of the PREFIX.bin and PREFIX.idx to write")],
    tokenizer_model: Annotated[Path, typer.Option(help="a SentencePiece .model or a Hugging Face tokenizer.json")],
    json_keys: Annotated[str, typer.Option(help="key of the text")] = "text",
    append_eod: Annotated[bool, typer.Option(help="end each document with the tokenizer's EOS")] = True,
    skip_bad_lines: Annotated[bool, typer.Option(help="leave out and count lines that cannot be used")] = False,
) -> None:
    """Tokenize documents into a shard that training reads."""
    try:
        summary = preprocess(
            input,
            output_prefix,
            load_tokenizer(tokenizer_model),
            text_key=json_keys,
            append_eod=append_eod,
            skip_bad_lines=skip_bad_lines,
        )
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{output_prefix}: {summary.documents} documents, {summary.tokens} tokens, {summary.text_bytes} bytes of text; "
        f"{summary.skipped_lines} bad lines skipped, {summary.empty_documents} empty documents left out; "
        f"{summary.seconds:.1f} s ({summary.megabytes_per_second:.1f} MB/s, {summary.tokens_per_second:,.0f} tokens/s)"
    )


if __name__ == "__main__":
    typer.run(main)

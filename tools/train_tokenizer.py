"""Trains a SentencePiece tokenizer on JSON Lines; see illada_megatron.data.preprocessing.train_tokenizer."""

from pathlib import Path
from typing import Annotated

import typer

from illada_megatron.cli.main import run_tool
from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.system.terminal import say


def main(
    input: Annotated[list[Path], typer.Option(help="JSON Lines files")],
    output: Annotated[
        Path, typer.Option(help="the model to write, ending in .model, or a directory for tokenizer.model")
    ],
    vocab_size: Annotated[int, typer.Option(help="pieces, special tokens and 256 bytes included")] = 8000,
    json_keys: Annotated[str, typer.Option(help="key of the text")] = "text",
) -> None:
    """Train a tokenizer that gives source code back exactly; the mask token has id 5."""
    path = train_sentencepiece(input, output, vocab_size=vocab_size, text_key=json_keys)
    say(f"{path}: {vocab_size} pieces")


if __name__ == "__main__":
    run_tool(main, "train_tokenizer")

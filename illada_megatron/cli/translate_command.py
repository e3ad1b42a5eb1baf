"""`illada translate`: a pretrain_gpt.py command line, typed or in a file, as a configuration."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from illada_megatron.config import ConfigError
from illada_megatron.config.megatron_options import Given, read_options
from illada_megatron.config.megatron_script import read_script
from illada_megatron.config.megatron_translation import GROUPS, Vocabulary, translate
from illada_megatron.system.terminal import say


def translate_command(
    words: Annotated[
        list[str],
        typer.Argument(
            help="The command line itself; or a file with it, - for stdin, then the script's arguments and NAME=VALUE "
            "for its variables."
        ),
    ],
) -> None:
    """Write Megatron-LM's options of pretrain_gpt.py as YAML for `illada train`, and say on stderr what became of those
    that have no field here (docs/from_megatron.md).

    `illada translate torchrun --nproc_per_node 8 pretrain_gpt.py --num-layers 32 ... > my.yaml`

    `illada translate train_gpt3_175b_distributed.sh runs/gpt3 runs/tb vocab.json merges.txt my_text_document > my.yaml`

    Nothing of a script is run. Then `illada train --config my.yaml --dry-run`.
    """
    given = read_options(_typed(words))
    done = translate(given, _vocabulary(given))
    say(done.yaml().rstrip("\n"))
    for group in GROUPS:
        if done.notes[group]:
            say(f"{group}:", error=True)
            for text in done.notes[group]:
                say(f"  {text}", error=True)
    if given.nproc is not None:
        nodes = f" --nnodes {given.nnodes} --rdzv-endpoint HOST:29500" if given.nnodes != "1" else ""
        say(f"start it with: illada train --nproc {given.nproc}{nodes} --config FILE", error=True)


def _typed(words: list[str]) -> list[str]:
    """The command's words, of the file where one is named."""
    first, *rest = words
    if first != "-" and (first.startswith("-") or not _is_file(first)):
        if not any("--" in word for word in words):
            raise ConfigError(f"{first}: no such file, and no options behind it: expected a script or a command line")
        # a whole command line as one word, as pasted between quotes
        return read_script(first).commands[-1] if len(words) == 1 else words
    try:
        text = sys.stdin.read() if first == "-" else Path(first).read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{first}: expected a shell script, found no text: {error}") from error
    variables = dict(word.split("=", 1) for word in rest if "=" in word and not word.startswith("-"))
    script = read_script(text, [word for word in rest if word.partition("=")[0] not in variables], variables)
    if script.branches:
        say(f"{first}: `{'`, `'.join(script.branches)}` is not decided: all of it is read, the last value counts", True)
    options = [sum(word.startswith("--") for word in command) for command in script.commands]
    if not any(options):
        raise ConfigError(f"{first}: no command with options in it, expected one of pretrain_gpt.py")
    return script.commands[options.index(max(options))]


def _is_file(text: str) -> bool:
    """A whole command line is too long for a name."""
    try:
        return Path(text).is_file()
    except OSError:
        return False


def _vocabulary(given: Given) -> Vocabulary | None:
    """Of the tokenizer's files, where they are here."""
    from illada_megatron.data.tokenizers.byte_level import byte_level_bpe
    from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

    vocab, merges, model = (given.get(name) for name in ("--vocab-file", "--merge-file", "--tokenizer-model"))
    if vocab and merges and Path(vocab).is_file() and Path(merges).is_file():
        made = byte_level_bpe(vocab, merges)
        return Vocabulary(made.vocab_size, made.mask_id)
    if model and Path(model).exists():
        tokenizer = load_tokenizer(model)
        return Vocabulary(tokenizer.vocab_size, tokenizer.mask_id)
    return None

"""`illada convert`: to and from the directories that Hugging Face's transformers loads, and to files that llama.cpp
runs. What needs torch is imported when a command runs."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from illada_megatron.config import ConfigError
from illada_megatron.system.console import made_console
from illada_megatron.system.terminal import counted, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from illada_megatron.checkpoint.hugging_face.tokenizer_files import TokenizerFiles
    from illada_megatron.checkpoint.store import CheckpointInfo

app = typer.Typer(
    help="Convert checkpoints to and from the layouts of Hugging Face's transformers, and to llama.cpp's GGUF.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Verify = Annotated[
    bool, typer.Option("--verify", help="Compare logits afterwards, in fp32 on the CPU; needs transformers.")
]


@app.command("to-hf")
def to_hf(
    checkpoint: Annotated[str, typer.Argument(help="A run's checkpoint.save_dir, or one step_... below it.")],
    directory: Annotated[Path, typer.Argument(help="What to write; must not exist or be empty.")],
    layout: Annotated[
        Literal["illada", "llada"], typer.Option(help="Names of tensors and of config.json's keys.")
    ] = "illada",
    dtype: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="fp32: of a run in bf16, the optimizer's main weights.")
    ] = "bf16",
    ema: Annotated[bool, typer.Option("--ema", help="The moving average of the weights in their place.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Of a file, as 5GB or 500MiB.")] = "5GB",
    tokenizer: Annotated[
        str | None, typer.Option(help="A file, a directory or org/name; default: the run's data.tokenizer_path.")
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Leave it out.")] = False,
    license_: Annotated[
        str | None, typer.Option("--license", help="For README.md, as the hub writes it: apache-2.0, mit, other.")
    ] = None,
    verify: Verify = False,
) -> None:
    """Write a checkpoint as a directory for `AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True)`.

    `illada convert to-hf runs/tiny/checkpoints exported --verify`
    """
    from illada_megatron.checkpoint.hugging_face.exporting import export, export_bytes
    from illada_megatron.checkpoint.hugging_face.model_card import CARD, CardWords
    from illada_megatron.checkpoint.hugging_face.verifying import check_transformers
    from illada_megatron.checkpoint.predictor import find_checkpoint

    if verify:
        check_transformers()
    card = CardWords(license_, shlex.join(["illada", *sys.argv[1:]]))
    info = find_checkpoint(checkpoint)
    words = None if no_tokenizer else _tokenizer_files(info, tokenizer)
    with _bar("exporting", export_bytes(info, layout, dtype)) as advance:
        done = export(info, directory, layout, dtype, _bytes(max_shard_size), words, advance, ema, card)
    weights = f"{dtype}, the optimizer's main weights" if done.from_main_weights else dtype
    weights += ", the moving average of the weights" if ema else ""
    say(f"{directory}: {done.tensors:,} tensors of {info.path}, {done.nbytes:,} bytes in {weights}, layout {layout}")
    shards = [name for name in done.files if name.endswith(".safetensors")]
    others = [name for name in done.files if name not in shards]
    say(f"files: {shards[0] if len(shards) == 1 else counted(len(shards), 'shard')}, {', '.join(others)}")
    missing = "" if license_ else "a license (--license), "
    say(f"to publish: complete {directory / CARD} ({missing}languages, use), then hf upload ORG/NAME {directory}")
    if verify:
        _verify(info, directory, ema)


@app.command("to-gguf")
def to_gguf(
    checkpoint: Annotated[str, typer.Argument(help="A run's checkpoint.save_dir, or one step_... below it.")],
    file: Annotated[Path, typer.Argument(help="What to write, ending in .gguf; must not exist.", metavar="OUT.gguf")],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"],
        typer.Option(help="Of matrices. fp32, fp16: of a run in bf16, the optimizer's main weights."),
    ] = "bf16",
    ema: Annotated[bool, typer.Option("--ema", help="The moving average of the weights in their place.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="A file, a directory or org/name; default: the run's data.tokenizer_path.")
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="The file knows ids alone, no text.")] = False,
) -> None:
    """Write a checkpoint as a file that llama.cpp runs; needs the package gguf.

    `illada convert to-gguf runs/tiny/checkpoints tiny.gguf --dtype fp32`
    """
    from illada_megatron.checkpoint.gguf.exporting import check_gguf, export_gguf, gguf_bytes
    from illada_megatron.checkpoint.gguf.vocabulary import vocabulary
    from illada_megatron.checkpoint.predictor import find_checkpoint

    check_gguf()
    info = find_checkpoint(checkpoint)
    words = None if no_tokenizer else vocabulary(*_tokenizer_name(info, tokenizer))
    with _bar("exporting", gguf_bytes(info, dtype)) as advance:
        done = export_gguf(info, file, dtype, words, advance, ema)
    weights = f"{dtype}, the optimizer's main weights" if done.from_main_weights else dtype
    weights += ", the moving average of the weights" if ema else ""
    say(f"{file}: {done.tensors:,} tensors of {info.path}, {done.nbytes:,} bytes in {weights}, architecture llada")
    if words is None:
        say("no tokenizer: llama.cpp runs it on ids alone")
    else:
        say(f"tokenizer {words.path}, {words.vocab_size:,} ids")
        for note in words.notes:
            say(f"otherwise than here, in llama.cpp {note}")


@app.command("from-hf")
def from_hf(
    directory: Annotated[Path, typer.Argument(help="With config.json and model.safetensors or its index.")],
    checkpoint: Annotated[str, typer.Argument(help="What to write: a directory or s3:// without checkpoints.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of the runs to come: `section.field=value`.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Of the runs to come; the model is the directory's.")
    ] = None,
    config_out: Annotated[
        Path | None, typer.Option(help="Where their configuration is written; default: CHECKPOINT/train.yaml.")
    ] = None,
    mask_token_id: Annotated[
        int | None,
        typer.Option(
            help="Where config.json has none. Default: the released models' (illada 5, llada 126336); for Llama and "
            "Qwen2 the tokenizer's mask, or else a new row behind the vocabulary."
        ),
    ] = None,
    verify: Verify = False,
) -> None:
    """Read a model in the layout of iLLaDA or LLaDA, or a Llama or Qwen2 to start diffusion training from.

    `illada convert from-hf exported runs/imported --verify`

    `illada convert from-hf Llama-3.2-1B runs/start data.tokenizer_path=tokenizer-with-mask training.precision=bf16`

    Then `illada generate --checkpoint runs/imported`, or
    `illada train --config runs/imported/train.yaml data.train_paths=[...]`.
    """
    from illada_megatron.checkpoint.hugging_face.importing import described, import_weights, open_source
    from illada_megatron.checkpoint.hugging_face.run_config import write_run_config
    from illada_megatron.checkpoint.hugging_face.verifying import check_transformers
    from illada_megatron.checkpoint.predictor import find_checkpoint
    from illada_megatron.runtime.tables import two_columns

    if verify:
        check_transformers()
    written = config_out or (None if checkpoint.startswith("s3://") else Path(checkpoint) / "train.yaml")
    if written is not None and written.exists():
        raise ConfigError(f"{written}: exists, and is not replaced: give another file with --config-out")
    source = open_source(directory, config, overrides or (), mask_token_id)
    made_console().print(two_columns(f"{directory}", described(source)))
    with _bar("importing", source.nbytes) as advance:
        path = import_weights(source, checkpoint, advance)
    say(f"{path}: {source.config.model.num_parameters:,} parameters, weights that runs begin with")
    if written is None:
        say("no configuration is written at s3://: --config-out FILE writes one to this machine")
    else:
        write_run_config(source, checkpoint, written)
        say(f"{written}: to train on, illada train --config {written} data.train_paths=[...] checkpoint.save_dir=...")
    if verify:
        _verify(find_checkpoint(checkpoint), directory)


def _tokenizer_files(info: "CheckpointInfo", tokenizer: str | None) -> "TokenizerFiles | None":
    from illada_megatron.checkpoint.hugging_face.tokenizer_files import tokenizer_files
    from illada_megatron.checkpoint.predictor import saved_config

    model = saved_config(info).model
    name, option = _tokenizer_name(info, tokenizer)
    return tokenizer_files(name, model.max_sequence_length, model.mask_token_id, option)


def _tokenizer_name(info: "CheckpointInfo", tokenizer: str | None) -> tuple[str, str]:
    """And the option that gave it. tokenizer: that of the command line."""
    from illada_megatron.checkpoint.predictor import saved_config

    if tokenizer is not None:
        return tokenizer, "--tokenizer"
    name = saved_config(info).data.tokenizer_path
    if name is None:
        raise ConfigError(
            f"{info.path}: the run names no data.tokenizer_path: give --tokenizer, or leave it out with --no-tokenizer"
        )
    return name, "data.tokenizer_path"


def _verify(info: "CheckpointInfo", directory: Path, ema: bool = False) -> None:
    from illada_megatron.checkpoint.hugging_face.verifying import verify

    result = verify(info, directory, ema=ema)
    say(
        f"verified in fp32 on weights in {result.rounded_to}: largest difference of logits "
        f"{result.largest_difference:.3g}, largest logit {result.largest_logit:.3g}"
    )
    result.check()


def _bytes(text: str) -> int:
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise ConfigError(f"--max-shard-size is {text!r}, expected a size as 5GB or 500MiB") from error
    if size <= 0:
        raise ConfigError(f"--max-shard-size is {text!r}, expected more than nothing")
    return int(size)


@contextmanager
def _bar(title: str, total: int) -> "Iterator[Callable[[int], None]]":
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=made_console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)

"""`illada generate`. torch is imported when the command runs: `illada preprocess` has no use for it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from illada_megatron.config import ConfigError, ModelConfig
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from illada_megatron.system.console import made_console
from illada_megatron.system.terminal import say

if TYPE_CHECKING:
    import torch

    from illada_megatron.generation.denoise import Denoised, Predict

_GAP = re.compile(r"<mask:(\d+)>")


def generate(
    checkpoint: Annotated[str, typer.Option(help="A run's checkpoint.save_dir, or one step_... below it.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; `<mask:N>` in it: N tokens to fill in.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="The same, from a file.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A file, a directory or org/name; default: the run's data.tokenizer_path.")
    ] = None,
    gen_length: Annotated[int, typer.Option(help="Most tokens to append.")] = 128,
    block_length: Annotated[int, typer.Option(help="Masks denoised together.")] = 32,
    steps: Annotated[int, typer.Option(help="Denoising steps of a block.")] = 32,
    temperature: Annotated[float, typer.Option(help="0: the most probable token.")] = 0.0,
    remasking: Annotated[str, typer.Option(help="low_confidence or random.")] = "low_confidence",
    seed: Annotated[int, typer.Option(help="Of the samples, where there are any.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    ema: Annotated[bool, typer.Option("--ema", help="With the moving average of the weights.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Only the text, without colours and film.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Also save what is shown as a picture.")] = None,
) -> None:
    """Continue a text, or fill its gaps, and show in which order the tokens came.

    `illada generate --checkpoint runs/tiny/checkpoints --prompt "def main("`

    `illada generate --checkpoint runs/tiny/checkpoints --prompt "for <mask:4> in range(10):"`
    """
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give one of --prompt and --prompt-file")
    from illada_megatron.generation.denoise import DenoiseConfig, infill
    from illada_megatron.generation.denoise import generate as continue_text

    text = prompt if prompt is not None else Path(prompt_file or "").read_text()
    try:
        settings = DenoiseConfig(steps, block_length, gen_length, temperature, remasking, seed)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    from illada_megatron.checkpoint.predictor import open_predictor

    with open_predictor(checkpoint, device, ema) as (predict, config):
        path = tokenizer or config.data.tokenizer_path
        if path is None:
            raise ConfigError(
                f"{checkpoint}: the run names no data.tokenizer_path: give its tokenizer with --tokenizer"
            )
        words = load_tokenizer(path, option="data.tokenizer_path" if tokenizer is None else "--tokenizer")
        _check_tokenizer(words, path, config.model)
        predict = _in_words(predict, words.vocab_size)
        tokens = _tokens(text, words, config.model)
        if (tokens == config.model.mask_token_id).any():
            result = infill(predict, tokens, settings, config.model.mask_token_id)
        else:
            _check_length(len(tokens) + gen_length, config.model)
            result = continue_text(predict, tokens, settings, config.model.mask_token_id, words.eos_id)
    _show(result, words, plain, svg)


def _check_tokenizer(words: Tokenizer, path: str | Path, model: ModelConfig) -> None:
    """Another's ids would be other words to this model, or none."""
    if words.vocab_size > model.vocab_size or words.mask_id not in (None, model.mask_token_id):
        mask = "no mask" if words.mask_id is None else f"mask {words.mask_id}"
        raise ConfigError(
            f"{path} has {words.vocab_size} tokens and {mask}, the checkpoint's model {model.vocab_size} ids and mask "
            f"{model.mask_token_id}: give the tokenizer that it was trained with, with --tokenizer"
        )


def _tokens(text: str, words: Tokenizer, model: ModelConfig) -> "torch.Tensor":
    """Token ids with N masks for each `<mask:N>`."""
    import torch

    ids: list[int] = []
    for index, part in enumerate(_GAP.split(text)):
        ids += [model.mask_token_id] * int(part) if index % 2 else words.encode(part)
    _check_length(len(ids), model)
    return torch.tensor(ids, dtype=torch.int64)


def _check_length(tokens: int, model: ModelConfig) -> None:
    if tokens > model.max_sequence_length:
        raise ConfigError(
            f"prompt and generation take {tokens} tokens, model.max_sequence_length is "
            f"{model.max_sequence_length}: shorten the prompt or --gen-length"
        )


def _in_words(predict: "Predict", vocab_size: int) -> "Predict":
    """On the CPU, and never an id that the tokenizer has no word for: a model may have more rows than that."""

    def logits(tokens: "torch.Tensor") -> "torch.Tensor":
        found = predict(tokens).cpu()
        found[..., vocab_size:] = float("-inf")
        return found

    return logits


def _show(result: "Denoised", words: Tokenizer, plain: bool, svg: Path | None) -> None:
    if plain:
        say(words.decode(result.tokens.tolist()))
        return
    from illada_megatron.generation.render import render

    screen = made_console(record=svg is not None)
    screen.print(render(result, words.piece))
    if svg is not None:
        screen.save_svg(str(svg), title="illada generate")

"""`illada sample`: what a training sample is, by its index, as logs name them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from illada_megatron.cli.run_commands import ConfigOption
from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.data.corpus.configured import corpus_of_run
from illada_megatron.data.corpus.corpus import Origin
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from illada_megatron.system.terminal import say

if TYPE_CHECKING:
    from torch import Tensor


def sample(
    arguments: Annotated[
        list[str], typer.Argument(metavar="INDEX... [SECTION.FIELD=VALUE]...", help="Samples; fields to change.")
    ],
    config: ConfigOption = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Read as the run of this checkpoint.save_dir (or step_... below it) does.")
    ] = None,
) -> None:
    """Print training samples: where each comes from, its t and segments, its text, and the text as the model sees it
    (`<mask:N>`: N masked tokens, as `illada generate --prompt` takes them). Reads exactly what training reads.

    `illada sample 81920 81921 --config examples/tiny/config.yaml`

    `illada sample 81920 --checkpoint runs/tiny/checkpoints`
    """
    indices = [_index(one) for one in arguments if "=" not in one]
    overrides = [one for one in arguments if "=" in one]
    if not indices:
        raise ConfigError("no sample index was given, expected one or more, as `illada sample 81920 --config FILE`")
    resolved, skipped = _resolve(config, checkpoint, overrides)
    words = load_tokenizer(resolved.data.tokenizer_path) if resolved.data.tokenizer_path else None
    corpus = corpus_of_run(resolved, words)
    for index in indices:
        say("\n".join([*_described(resolved, corpus, index, words), *_passed_over(index, skipped), ""]))


def _index(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is neither a sample index (0 or more) nor section.field=value")
    return int(text)


def _resolve(
    config: str | None, checkpoint: str | None, overrides: list[str]
) -> tuple[RunConfig, list[tuple[int, int]]]:
    """The run's configuration, and the ranges [first, end) of samples that it passes over."""
    if (config is None) == (checkpoint is None):
        raise ConfigError("give one of --config and --checkpoint: what a sample is depends on the run's data and seed")
    if checkpoint is None:
        return load_config(config, overrides), []
    from illada_megatron.checkpoint.predictor import find_checkpoint, saved_config

    info = find_checkpoint(checkpoint)
    saved = (info.progress or {}).get("bad_steps", {}).get("skipped_samples", [])
    return saved_config(info, overrides), [(first, end) for first, end in saved]


def _described(config: RunConfig, corpus: Any, index: int, words: Tokenizer | None) -> Iterator[str]:
    from illada_megatron.diffusion import make_masked_batch, mask_probability

    model, diffusion = config.model, config.diffusion
    batch = make_masked_batch(corpus, [index], diffusion, model.mask_token_id, config.training.seeds.noise)
    yield from _origin_lines(index, corpus.origin(index))
    if diffusion.complementary_masks:
        yield f"  the window of sample {index ^ 1} too, which is masked where this one is clear"
    masked = int((batch.tokens == model.mask_token_id).sum())
    times = [float(t) for t in (batch.t if batch.segment_t is None else batch.segment_t)]
    chances = [mask_probability(t, diffusion.eps, diffusion.noise_schedule) for t in times]
    p = f", p {_list(chances)}" if diffusion.mask_sampling == "bernoulli" else ""
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    yield (
        f"  t {_list(times)}{p}; {masked} of {batch.tokens.numel()} tokens masked; "
        f"segments of {' + '.join(map(str, lengths))} tokens"
    )
    yield "clean:"
    yield _text(batch.labels[0], words, model.mask_token_id)
    yield "masked:"
    yield _text(batch.tokens[0], words, model.mask_token_id)


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _origin_lines(index: int, origin: Origin) -> Iterator[str]:
    name = f"corpus {origin.corpus}, its sample {origin.index}" if origin.corpus else f"sample {origin.index}"
    where = f"number {origin.position} of {origin.num_windows} in epoch {origin.epoch}"
    yield f"sample {index}: {name}, {where}" if origin.corpus else f"{name}: {where}"
    for piece in origin.pieces:
        documents = f"document {piece.first_document}"
        if piece.last_document > piece.first_document:
            documents = f"documents {piece.first_document} to {piece.last_document}"
        yield f"  {piece.prefix}: tokens {piece.first_token} to {piece.end_token - 1}, {documents}"


def _text(tokens: "Tensor", words: Tokenizer | None, mask_token_id: int) -> str:
    """Text, or ids without a tokenizer; masks as `<mask:N>`."""
    parts: list[str] = []
    run: list[int] = []
    masks = 0
    for token in [*tokens.tolist(), None]:
        if token == mask_token_id:
            masks += 1
        if run and (token == mask_token_id or token is None):
            parts.append(words.decode(run, skip_special_tokens=False) if words else " ".join(map(str, run)))
            run = []
        if masks and token != mask_token_id:
            parts.append(f"<mask:{masks}>")
            masks = 0
        if token is not None and token != mask_token_id:
            run.append(token)
    return ("" if words else " ").join(parts)


def _passed_over(index: int, skipped: list[tuple[int, int]]) -> Iterator[str]:
    for first, end in skipped:
        if first <= index < end:
            yield f"passed over since a rollback: samples {first} to {end - 1} (docs/faults.md)"

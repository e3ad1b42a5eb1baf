"""`illada generate`. torch is imported when the command runs: `illada preprocess` has no use for it."""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from illada_megatron.cli.run_commands import LAUNCH, NprocOption
from illada_megatron.config import ConfigError
from illada_megatron.system.console import made_console
from illada_megatron.system.terminal import say

if TYPE_CHECKING:
    from illada_megatron.generation import Generator, Result, Settings

_RULES, _TOKENS, _END, _SHOWN = "Which masks a step reveals", "Which token", "Where it ends", "What is shown"


def generate(
    checkpoint: Annotated[
        str, typer.Option(help="A run's checkpoint.save_dir, one step_... below it, or a Hugging Face directory.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue, as often as there are texts; `<mask:N>` in it: N tokens to fill in."),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text, from a file.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Many: a JSON text or {"prompt": text, field of the settings: value} a line.')
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A file, a directory or org/name; default: the run's data.tokenizer_path.")
    ] = None,
    gen_length: Annotated[int, typer.Option(help="Most tokens to append.")] = 128,
    block_length: Annotated[int, typer.Option(help="Masks denoised together.")] = 32,
    fixed_length: Annotated[
        bool, typer.Option("--fixed-length", help="All masks from the start, as LLaDA; else block by block.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Denoising steps of a block.", rich_help_panel=_RULES)] = 32,
    remasking: Annotated[
        str, typer.Option(help="Confidence: low_confidence, random, margin or entropy.", rich_help_panel=_RULES)
    ] = "low_confidence",
    reveal: Annotated[
        str, typer.Option(help="By steps, threshold, factor or hierarchy.", rich_help_panel=_RULES)
    ] = "steps",
    threshold: Annotated[float, typer.Option(help="Confidence that reveals.", rich_help_panel=_RULES)] = 0.9,
    low_threshold: Annotated[
        float, typer.Option(help="The same for the best of a run of masks (hierarchy).", rich_help_panel=_RULES)
    ] = 0.4,
    factor: Annotated[float, typer.Option(help="Of --reveal factor.", rich_help_panel=_RULES)] = 1.0,
    credit: Annotated[
        bool, typer.Option("--credit", help="Favour what was best in steps before.", rich_help_panel=_RULES)
    ] = False,
    temperature: Annotated[float, typer.Option(help="0: the most probable token.", rich_help_panel=_TOKENS)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample of the k most probable; 0: all.", rich_help_panel=_TOKENS)] = 0,
    top_p: Annotated[float, typer.Option(help="Sample of this much probability.", rich_help_panel=_TOKENS)] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divides logits of tokens that are there.", rich_help_panel=_TOKENS)
    ] = 1.0,
    guidance: Annotated[float, typer.Option(help="Classifier-free, of the prompt.", rich_help_panel=_TOKENS)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the samples, where there are any.", rich_help_panel=_TOKENS)] = 0,
    eos: Annotated[str, typer.Option(help="End of text: stop, last or never.", rich_help_panel=_END)] = "stop",
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.", rich_help_panel=_END)] = None,
    stop_pattern: Annotated[
        str | None, typer.Option(help="The same, a regular expression.", rich_help_panel=_END)
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="What is generated matches this expression, whole.", rich_help_panel=_END)
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="It is JSON that fits the schema in this file.", rich_help_panel=_END)
    ] = None,
    end_think_boost: Annotated[
        float, typer.Option(help="Of </think>, growing with the text; 0: none.", rich_help_panel=_END)
    ] = 0.0,
    end_think_power: Annotated[float, typer.Option(help="How it grows.", rich_help_panel=_END)] = 2.0,
    cache: Annotated[
        str, typer.Option(help="Keys and values kept: none, prefix, dual, vicinity or delayed (approximations).")
    ] = "none",
    cache_refresh: Annotated[int, typer.Option(help="Steps between refreshes of `delayed`.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    ema: Annotated[bool, typer.Option("--ema", help="With the moving average of the weights.")] = False,
    nproc: NprocOption = None,
    pipeline: Annotated[
        int,
        typer.Option(min=1, help="Pipeline stages of the ranks; the rest is tensor parallel.", rich_help_panel=LAUNCH),
    ] = 1,
    plain: Annotated[
        bool, typer.Option("--plain", help="Only the text, without colours and film.", rich_help_panel=_SHOWN)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each text.", rich_help_panel=_SHOWN)
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Play the denoising while it happens, one text.", rich_help_panel=_SHOWN)
    ] = False,
    svg: Annotated[
        Path | None, typer.Option(help="Also save what is shown as a picture.", rich_help_panel=_SHOWN)
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also save a page with a slider over the steps.", rich_help_panel=_SHOWN)
    ] = None,
) -> None:
    """Continue texts, or fill their gaps, and show in which order the tokens came.

    `illada generate --checkpoint runs/tiny/checkpoints --prompt "def main("`

    `illada generate --checkpoint runs/tiny/checkpoints --prompt "for <mask:4> in range(10):"`

    Faster: `--reveal threshold --cache prefix` (docs/generation.md says what that changes).
    """
    given = dict(locals())
    texts = _texts(prompt, prompt_file, prompts)
    if plain + as_json + (show or svg is not None) > 1:
        raise ConfigError("--plain, --json and the picture (--show, --svg) are three ways to see a text: give one")
    if len(texts) > 1 and (show or svg is not None):
        raise ConfigError(f"--show and --svg are of one text, found {len(texts)}")
    from illada_megatron.runtime import adopt_slurm_rank, end_with_launcher, is_rank, rank_from_environment

    if nproc is not None and nproc > 1 and not is_rank():
        from illada_megatron.runtime.launch import LaunchOptions, launch_ranks

        launch_ranks(LaunchOptions(nproc), sys.argv[1:])
    if nproc is None:
        adopt_slurm_rank()
    end_with_launcher()
    from illada_megatron.generation import Generator, Settings

    names = {field.name for field in fields(Settings)}
    given["stop"] = tuple(stop or ())
    given["json_schema"] = json_schema.read_text() if json_schema is not None else None
    chosen = {name: value for name, value in given.items() if name in names}
    settings = [_settings(chosen | own) for _, own in texts]
    with Generator.open(checkpoint, device, tokenizer, pipeline, ema) as generator:
        try:
            if show:
                results = _played(generator, texts[0][0], settings[0])
            else:
                results = generator.generate([text for text, _ in texts], settings)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if rank_from_environment() == 0:
            for result in results:
                _show(result, generator, plain, as_json, svg)
            if html is not None:
                from illada_megatron.generation.page import write_page

                write_page(html, results, generator.tokenizer.piece)


def _played(generator: "Generator", text: str, settings: "Settings") -> "list[Result]":
    """The steps in the terminal, as they are made; nothing where another rank has them."""
    from rich.live import Live

    from illada_megatron.generation.render import frame, most_steps

    results = []
    with Live(console=made_console(), auto_refresh=False, transient=True) as screen:
        for job, step in generator.stream(text, settings):
            if step.end is None:
                screen.update(frame(job.text, generator.tokenizer.piece, most_steps(settings)), refresh=True)
            else:
                results.append(generator.result(job, step))
    return results


def _texts(prompt: list[str] | None, file: Path | None, many: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """Each text with the settings of its own."""
    if sum(one is not None for one in (prompt or None, file, many)) != 1:
        raise ConfigError("give one of --prompt, --prompt-file and --prompts")
    if prompt:
        return [(one, {}) for one in prompt]
    if file is not None:
        return [(file.read_text(), {})]
    assert many is not None
    texts = []
    for number, line in enumerate(many.read_text().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{many}, line {number}: not valid JSON ({error})") from error
        own = dict(found) if isinstance(found, dict) else {"prompt": found}
        text = own.pop("prompt", None)
        if not isinstance(text, str):
            raise ConfigError(f'{many}, line {number}: expected a text or {{"prompt": text}}, found {line[:80]!r}')
        texts.append((text, own))
    return texts


def _settings(values: dict[str, Any]) -> "Settings":
    from illada_megatron.generation import Settings

    try:
        return Settings(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _show(result: "Result", generator: "Generator", plain: bool, as_json: bool, svg: Path | None) -> None:
    words = generator.tokenizer
    if as_json:
        say(json.dumps(result.record()))
        return
    if plain:
        say(words.decode(result.tokens.tolist()))
        return
    from illada_megatron.generation.render import render

    screen = made_console(record=svg is not None)
    screen.print(render(result, words.piece))
    if svg is not None:
        screen.save_svg(str(svg), title="illada generate")

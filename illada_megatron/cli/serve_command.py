"""`illada serve`. torch, and what the extra `serve` brings, are imported when the command runs."""

import ipaddress
import json
import os
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from illada_megatron.config import ConfigError
from illada_megatron.system.terminal import say

_KEY = "ILLADA_API_KEY"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "re2")
_LIMITS, _ACCESS = "Limits", "Who may ask"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def serve(
    checkpoint: Annotated[
        str, typer.Option(help="A run's checkpoint.save_dir, one step_... below it, or a Hugging Face directory.")
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="A file, a directory or org/name; default: the run's data.tokenizer_path.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file; default: the tokenizer's own, where it has one.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the model, as requests give it.")] = "illada",
    default: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=VALUE that holds where a request gives none, as gen_length=256 or reveal=threshold."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at. Others than this machine's own need an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"A key a line; any of them is needed then. Or one in {_KEY}.", rich_help_panel=_ACCESS),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name by which requests may call the server, beside localhost.", rich_help_panel=_ACCESS),
    ] = None,
    per_minute: Annotated[
        int, typer.Option(min=0, help="Requests of a key, or an address; 0: any.", rich_help_panel=_ACCESS)
    ] = 0,
    most_running: Annotated[int, typer.Option(min=1, help="Texts that share a pass.", rich_help_panel=_LIMITS)] = 64,
    most_queued: Annotated[
        int, typer.Option(min=1, help="Texts that wait; more are told to come back.", rich_help_panel=_LIMITS)
    ] = 1024,
    most_texts: Annotated[int, typer.Option(min=1, help="Of one request.", rich_help_panel=_LIMITS)] = 16,
    most_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="To generate of one text; default: what the model's length leaves.", rich_help_panel=_LIMITS
        ),
    ] = None,
    most_bytes: Annotated[int, typer.Option(min=1, help="Of a request's body.", rich_help_panel=_LIMITS)] = 1 << 20,
    grace: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds for what is in work when the server is told to end.", rich_help_panel=_LIMITS
        ),
    ] = 30.0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    ema: Annotated[bool, typer.Option("--ema", help="With the moving average of the weights.")] = False,
) -> None:
    """Answer OpenAI's clients, fill in gaps, and show at / how texts come.

    `illada serve --checkpoint runs/tiny/checkpoints`, then
    `OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").completions.create(model="illada", prompt="def main(")`
    """
    if missing := [one for one in _NEEDED if find_spec(one) is None]:
        raise ConfigError(f"illada serve needs {', '.join(missing)}: pip install 'illada-megatron[serve]'")
    from illada_megatron.runtime import world_size_from_environment

    if (ranks := world_size_from_environment()) > 1:
        raise ConfigError(f"illada serve is of one rank, found {ranks}: start one for each device (docs/serving.md)")
    from illada_megatron.generation import Generator
    from illada_megatron.serving.conversations import conversations_or_why
    from illada_megatron.serving.options import Options
    from illada_megatron.serving.server import listening
    from illada_megatron.serving.server import serve as serve_until_told

    keys, defaults = _keys(api_key_file), _defaults(default or [])
    with listening(host, port) as listener:
        address, bound = listener.getsockname()[:2]
        alone = ipaddress.ip_address(address).is_loopback
        if not alone and not keys:
            raise ConfigError(
                f"--host {host}: all who reach this machine could ask: give an API key, in --api-key-file or {_KEY}"
            )
        options = Options(
            name=name,
            defaults=defaults,
            keys=keys,
            allowed_hosts=tuple([*_LOOPBACK_NAMES, *(allowed_host or [])] if alone or allowed_host else ["*"]),
            most_running=most_running,
            most_queued=most_queued,
            most_texts=most_texts,
            most_tokens=most_tokens,
            most_bytes=most_bytes,
            per_minute=per_minute,
            grace_seconds=grace,
        )
        with Generator.open(checkpoint, device, tokenizer, ema=ema) as generator:
            shown = f"[{address}]" if ":" in address else address
            serve_until_told(
                generator,
                options,
                conversations_or_why(generator, chat_template),
                listener,
                lambda _end: say(f"illada: {name} at http://{shown}:{bound}"),
            )


def _keys(file: Path | None) -> tuple[str, ...]:
    """Never an option: the system shows a command's options to all its users."""
    text = file.read_text(encoding="utf-8") if file is not None else os.environ.get(_KEY, "")
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if file is not None and not keys:
        raise ConfigError(f"{file}: holds no key, expected one a line")
    return keys


def _defaults(given: list[str]) -> dict[str, Any]:
    """128 tokens, as `illada generate`, unless they say otherwise."""
    from illada_megatron.generation import Settings

    names = {field.name for field in fields(Settings)} - {"stop_pattern"}
    values: dict[str, Any] = {"gen_length": 128}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or name not in names:
            raise ConfigError(f"--default {one}: expected FIELD=VALUE, FIELD one of {', '.join(sorted(names))}")
        try:
            values[name] = value if name in ("regex", "json_schema") else json.loads(value)
        except ValueError:
            values[name] = value  # a word
    try:
        Settings(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--default: {error}") from error
    return values

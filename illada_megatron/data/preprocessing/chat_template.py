"""A tokenizer's chat template as its files hold it. Rendering is in chat.py, which takes jinja2: a corpus of plain text
does not wait for that."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from illada_megatron.data.errors import DataError

_CONFIG_NAME = "tokenizer_config.json"


class BadConversation(Exception):  # noqa: N818 (not an error of the input: such a conversation is dropped and counted)
    """A conversation that must not be trained on; the message is the reason to count it by."""


class ChatTemplate(BaseModel):
    """The template's source and the special tokens it may name (bos_token, eos_token, ...)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: str
    variables: dict[str, str]


def load_chat_template(tokenizer_path: Path, template_path: Path | None) -> ChatTemplate:
    """The template in `template_path`, else the chat_template of the tokenizer_config.json beside the tokenizer, which
    also gives the special tokens. Raises DataError where there is none."""
    config_path = tokenizer_path.parent / _CONFIG_NAME
    config: dict[str, Any] = {}
    if config_path.is_file():
        try:
            config = json.loads(config_path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{config_path}: not valid JSON ({error})") from error
        if not isinstance(config, dict):
            raise DataError(f"{config_path}: expected an object with keys, found {type(config).__name__}")
    try:
        source = template_path.read_text(encoding="utf-8") if template_path else config.get("chat_template")
    except UnicodeDecodeError as error:
        raise DataError(f"{template_path}: a chat template is text in UTF-8, which this is not ({error})") from error
    if not isinstance(source, str):
        raise DataError(
            f"{config_path}: no chat_template found there (a string), expected one for conversations: "
            "pass the template's file with --chat-template"
        )
    variables = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                variables[name] = text
    return ChatTemplate(source=source, variables=variables)

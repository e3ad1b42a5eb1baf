"""Conversations -> the tokens that a model was trained on: by the same template, sandbox and tokenizer as `illada
preprocess --chat`."""

from pathlib import Path
from typing import Any

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.chat import ChatRenderer
from illada_megatron.data.preprocessing.chat_template import BadConversation, load_chat_template
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer
from illada_megatron.generation import Generator

_ANSWER = "illada"


class Conversations:
    """One thread at a time calls it."""

    def __init__(self, tokenizer: Path, template: Path | None) -> None:
        """template: None: the tokenizer's own. Raises DataError where there is none."""
        self._words = load_tokenizer(tokenizer, special_tokens=True)
        self._names = self._words.special_names()
        self._renderer = ChatRenderer(load_chat_template(tokenizer, template), self._names)
        self.turn_end = self._turn_end_name()
        """The special token that the template writes behind an answer, where it does."""

    def tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        """Of a conversation and the begin of the answer to it. Raises ValueError where it is none, the template refuses
        it, or a message spells a special token: it would forge a turn."""
        try:
            text = self._renderer.render(messages, add_generation_prompt=True)
        except BadConversation as error:
            raise ValueError(f"messages: {error}: it would begin or end a turn") from error
        except ValueError as error:
            raise ValueError(f"messages: the request {error}") from error
        return self._words.encode(text)

    def _turn_end_name(self) -> str | None:
        turn = [{"role": "user", "content": _ANSWER}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self._renderer.render(turn)
        except (BadConversation, ValueError):
            return None  # a template that wants more than two turns says so to whoever sends them
        behind = text.rpartition(_ANSWER)[2].lstrip()
        return next((name for name in self._names if name and behind.startswith(name)), None)


def conversations_or_why(generator: Generator, template: Path | None) -> Conversations | str:
    """Where the tokenizer's own template is none, why. Raises DataError where `template` is none."""
    assert generator.tokenizer_path is not None
    try:
        return Conversations(generator.tokenizer_path, template)
    except DataError as error:
        if template is not None:
            raise
        return str(error)

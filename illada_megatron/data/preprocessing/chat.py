"""Conversations -> text, by the tokenizer's own Jinja chat template, as `transformers` renders it.

The rendered text is encoded with special tokens recognised, so a conversation that makes it spell one which the
template has not written would forge a turn: it is refused. What the template writes is marked while it renders, so that
nothing else is taken for it, however the content was split, joined or trimmed."""

import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import jinja2

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.chat_template import BadConversation, ChatTemplate
from illada_megatron.data.preprocessing.template_sandbox import CountingSandbox

SPECIAL_IN_CONTENT = "special token in content"


# a name as templates make it of a role: <|user|>, [USER]
_AROUND_A_ROLE = re.compile(r"\W*(\w+)\W*")


class ChatRenderer:
    """Renders conversations; special_tokens: names that only the template may write."""

    def __init__(self, template: ChatTemplate, special_tokens: Iterable[str]) -> None:
        self._names = sorted(filter(None, set(special_tokens)), key=lambda name: (-len(name), name))
        self._special = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._cores = {name: found[1].casefold() for name in self._names if (found := _AROUND_A_ROLE.fullmatch(name))}
        # nobody can guess it, so no content has it
        nonce = secrets.token_hex(16)
        self._marks = {name: f"\ue000{nonce}{number}\ue001" for number, name in enumerate(self._names)}
        self._mark = re.compile(f"\ue000{nonce}([0-9]+)\ue001")
        self._sandbox = CountingSandbox()
        self._sandbox.filters["tojson"] = _to_json
        self._sandbox.globals["raise_exception"] = _refuse
        try:
            self._template = self._sandbox.compiled(template.source, self._marked)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"chat template, line {error.lineno}: {error.message}") from error
        except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise DataError(
                f"chat template: Python cannot compile it ({type(error).__name__}: {error}): give a simpler one with "
                "--chat-template"
            ) from error
        self._variables = {name: self._marked(value) for name, value in template.variables.items()}

    def render(self, messages: Any, add_generation_prompt: bool = False) -> str:
        """The text of the conversation `messages`, [{"role": ..., "content": ...}, ...]; add_generation_prompt: and of
        the begin of an answer.

        Raises BadConversation where a message spells a special token; ValueError (what the key holds, as the end of a
        sentence) where it is no conversation or the template refuses it."""
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise ValueError('does not hold a conversation, expected [{"role": "user", "content": "..."}, ...]')
        if any("role" not in message for message in messages):
            raise ValueError("holds a message without a role")
        if any(self._special.search(text) for text in _strings(messages)):
            raise BadConversation(SPECIAL_IN_CONTENT)
        self._sandbox.steps = 0
        try:
            rendered = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # a template may do whatever raises something
            reason = self._unmarked(str(error)) or type(error).__name__
            raise ValueError(f"holds a conversation that the chat template refuses: {reason}") from error
        text = self._unmarked(rendered)
        written = Counter(self._names[int(number)] for number in self._mark.findall(rendered))
        if Counter(self._special.findall(text)) - written - self._around_roles(messages, written):
            raise BadConversation(SPECIAL_IN_CONTENT)
        return text

    def _marked(self, text: str) -> str:
        return self._special.sub(lambda found: self._marks[found[0]], text)

    def _unmarked(self, text: str) -> str:
        return self._mark.sub(lambda found: self._names[int(found[1])], text)

    def _around_roles(self, messages: list[dict[str, Any]], written: Counter[str]) -> Counter[str]:
        """Names that the template may have put together around a role, as in '<|' + message.role + '|>': one a message,
        of those that it has not written as they are."""
        roles = Counter(role.casefold() for message in messages if isinstance(role := message["role"], str))
        return Counter({name: max(0, roles[core] - written[name]) for name, core in self._cores.items()})


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.items()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)

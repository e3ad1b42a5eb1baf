"""Bodies of requests: OpenAI's fields and, by the same names as everywhere, those of `Settings`.

A field that is not known is refused, and so is one of OpenAI's that cannot be meant here, with the reason; unless it
asks for what happens anyway, as clients write it out ("logprobs": null, "presence_penalty": 0).
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from illada_megatron.generation import Settings
from illada_megatron.generation.settings import Cache, Confidence, Eos, Reveal

_ONE_CHAIN = (
    "a token's probability given all others is no probability of the text (its confidence is in `illada`, streamed)"
)
_NO_TOOLS = "this server calls none"
# field of OpenAI's -> values that change nothing, why others are refused
_ELSEWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((False,), _ONE_CHAIN),
    "top_logprobs": ((0,), _ONE_CHAIN),
    "logit_bias": (({},), "there is none"),
    "frequency_penalty": ((0,), "set repetition_penalty"),
    "presence_penalty": ((0,), "set repetition_penalty"),
    "best_of": ((1,), "texts have no likelihood to choose by: set n"),
    "echo": ((False,), "the prompt is the client's already"),
    "suffix": (("",), "ask /v1/infill for `PROMPT<mask:N>SUFFIX`"),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": ((True, False), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "response_format": (({"type": "text"},), "chat takes it: set json_schema or regex"),
    "modalities": ((["text"],), "there is text alone"),
    "audio": ((), "there is text alone"),
    "prediction": ((), "nothing is predicted from it"),
    "reasoning_effort": (("none",), "set end_think_boost"),
    "store": ((False,), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one"),
    "web_search_options": ((), "nothing is searched"),
}
# of whom or what a request is: nothing here depends on it
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")


def _whole(text: str) -> str:
    """JSON can spell half of a character ("\\ud800"), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} is half of a surrogate pair, which is no text") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Stop = Annotated[Text, Field(max_length=1_000)]
_MOST_STOPS, _MOST_STOP_CHARACTERS = 16, 1_000
_MOST_EXPRESSION = 10_000
MOST_N = 128
CONSTRAINTS = ("regex", "json_schema")


class Given(BaseModel):
    """What a client has written. Of its faults one is found, not all: a body of 1 MiB has room for 100,000."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _of_known_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        left = cls.understood(given)
        known = {one.alias or name for name, one in cls.model_fields.items()}
        for name in left:
            if name not in known:
                shown = name[:100].encode(errors="backslashreplace").decode()  # it may be long, or half a character
                raise PydanticCustomError("extra_forbidden", "{param} is not known", {"param": shown})
        return left

    @classmethod
    def understood(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Without what changes nothing."""
        return given


class StreamOptions(Given):
    include_usage: bool = False
    include_obfuscation: bool = False


class Body(Given):
    """What all requests may give. Ranges that are not here are `Settings`' own; those here keep a number from becoming
    infinite in a pass, or hold for what is not asked of `Settings`."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MOST_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    gen_length: int | None = Field(None, ge=1)
    block_length: int | None = None
    fixed_length: bool | None = None
    steps: int | None = None
    remasking: Confidence | None = None
    reveal: Reveal | None = None
    threshold: float | None = None
    low_threshold: float | None = None
    factor: float | None = Field(None, le=1e6)
    credit: bool | None = None
    temperature: float | None = Field(None, le=100)
    top_k: int | None = Field(None, ge=0, lt=1 << 31)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    guidance: float | None = Field(None, le=1000)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    eos: Eos | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    stop_pattern: Text | None = None
    end_think_boost: float | None = Field(None, le=1e6)
    end_think_power: float | None = Field(None, le=100)
    cache: Cache | None = None
    cache_refresh: int | None = None

    @classmethod
    def understood(cls, given: dict[str, Any]) -> dict[str, Any]:
        left = {name: value for name, value in given.items() if name not in _IGNORED}
        for name in _ELSEWHERE.keys() & left.keys() - cls.model_fields.keys():
            same, why = _ELSEWHERE[name]
            value = left.pop(name)
            if value is not None and not any(
                type(value) is type(one) and value == one for one in (*same, *_float(same))
            ):
                raise _unsupported(name, why)
        return left

    def chosen(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `Settings` but for stop_pattern, which `patterns.py` takes, and what an infilling cannot have:
        regex and json_schema."""
        names = {field.name for field in fields(Settings)} - {"stop_pattern", *CONSTRAINTS}
        if isinstance(self.stop, list) and (characters := sum(map(len, self.stop))) > _MOST_STOP_CHARACTERS:
            raise ValueError(
                f"stop: {characters} characters together, at most {_MOST_STOP_CHARACTERS}: they are looked for again "
                "with each step"
            )
        given = {name: getattr(self, name) for name in names}
        chosen = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        for name in CONSTRAINTS:
            chosen.pop(name, None)
        if "block_length" in self.model_fields_set:
            chosen["block_length"] = self.block_length  # null is a choice: all masks at once
            if self.steps is None and self.block_length is not None:  # whoever gave no steps need not know how many
                chosen["steps"] = min(chosen.get("steps", Settings.steps), self.block_length)
        if not chosen.get("temperature"):  # clients send both, whatever they want: nothing is sampled
            chosen = {name: value for name, value in chosen.items() if name not in ("top_k", "top_p")}
        if length := self.length():
            chosen["gen_length"] = length
        return chosen

    def length(self) -> int | None:
        """Most tokens to generate; None: not said."""
        return self.gen_length


def _unsupported(name: str, why: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{param} cannot be asked for here: {why}", {"param": name, "why": why})


def _float(values: tuple[Any, ...]) -> list[float]:
    """A number that is written with a point."""
    return [float(one) for one in values if type(one) is int]


class OpenAIBody(Body):
    """What continues a prompt: it may follow an expression."""

    max_tokens: int | None = Field(None, ge=1)
    regex: Annotated[Text, Field(max_length=_MOST_EXPRESSION)] | None = None
    json_schema: dict[str, Any] | Text | None = None

    def schema_text(self) -> str | None:
        """The JSON schema that is asked for. Raises ValueError."""
        return json.dumps(self.json_schema) if isinstance(self.json_schema, dict) else self.json_schema

    def chosen(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """With regex or json_schema: the request's, else the defaults'. Raises ValueError where both are given, or
        what would cut the text."""
        chosen, own = super().chosen(defaults), {"regex": self.regex, "json_schema": self.schema_text()}
        if not any(own.values()):
            own = {name: defaults.get(name) for name in CONSTRAINTS}
        if not any(own.values()):
            return chosen
        if self.stop or self.stop_pattern:
            raise ValueError("stop and stop_pattern would cut a text that follows regex or json_schema as a whole")
        return {**chosen, **own, "stop": ()}

    def length(self) -> int | None:
        return _one_of(gen_length=self.gen_length, max_tokens=self.max_tokens)


def _kind(prompt: Any) -> str:
    """Of which type a prompt is meant to be, by its first element: the errors of one are told, not of all four."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if not isinstance(prompt, list):
        return "[text]"
    return "[ids]" if type(first) is int else "[lists]" if isinstance(first, list) else "[texts]"


_Ids = Annotated[list[Id], Field(fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("[text]")]
    | Annotated[list[Text], Field(fail_fast=True), Tag("[texts]")]
    | Annotated[_Ids, Tag("[ids]")]
    | Annotated[list[_Ids], Field(fail_fast=True), Tag("[lists]")],
    Discriminator(_kind),
]


class CompletionBody(OpenAIBody):
    prompt: Prompt

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[one for one in self.prompt if isinstance(one, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextPart(Given):
    type: Literal["text"]
    text: Text


class Schema(Given):
    """OpenAI's `json_schema`."""

    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class Format(Given):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    def schema_of(self) -> str | None:
        """Raises ValueError."""
        if self.type == "json_object":
            raise ValueError("response_format json_object: JSON of any form nests without end: set a json_schema")
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format: json_schema goes with type 'json_schema', and with no other")
        return json.dumps(self.json_schema.schema_) if self.json_schema is not None else None


_UNSPOKEN = ("refusal", "audio", "tool_calls", "function_call", "annotations", "name")
"""What OpenAI's client sends back with an answer, empty."""


class Message(Given):
    role: Text
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Text | None = None

    @classmethod
    def understood(cls, given: dict[str, Any]) -> dict[str, Any]:
        left = {name: value for name, value in given.items() if value or name not in _UNSPOKEN}
        for name in _UNSPOKEN:
            if name in left and name not in cls.model_fields:
                raise _unsupported(name, "a message is a role and a text; leave it out, or null")
        return left

    def plain(self) -> dict[str, str]:
        """As a chat template reads it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name is not None else {})


class ChatBody(OpenAIBody):
    response_format: Format | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)

    def schema_text(self) -> str | None:
        asked = self.response_format.schema_of() if self.response_format is not None else None
        own = super().schema_text()
        if asked is not None and own is not None:
            raise ValueError("response_format and json_schema are names of one thing: give one of them")
        return asked or own

    def length(self) -> int | None:
        return _one_of(
            gen_length=self.gen_length, max_tokens=self.max_tokens, max_completion_tokens=self.max_completion_tokens
        )


class InfillBody(Body):
    prompt: Text
    """With gaps, `<mask:N>`."""


def _one_of(**given: int | None) -> int | None:
    """Names of the same."""
    found = {name: value for name, value in given.items() if value is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} {value}" for name, value in found.items())
        raise ValueError(f"{said} are names of one thing: give one of them")
    return next(iter(found.values()), None)

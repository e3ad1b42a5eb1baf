"""Answers as JSON: OpenAI's objects, and beside them, as `illada`, what a text's denoising was like."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from illada_megatron.generation import Result
from illada_megatron.serving.worker import Progress

Piece = Callable[[int], str]


class Form(Protocol):
    """What differs between the kinds of answers."""

    prefix: str
    whole: str
    """The answer's `object`."""
    part: str
    """That of a piece of a stream."""

    def choice(self, text: str) -> dict[str, Any]:
        """A finished text."""

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        """A piece of one."""


class Completion:
    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": None}

    def delta(self, text: str, first: bool) -> dict[str, Any]:  # noqa: ARG002
        return self.choice(text)


class Chat:
    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None}

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text}, "logprobs": None}


class Infilling:
    prefix, whole, part = "infill", "infill", "infill.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, first: bool) -> dict[str, Any]:  # noqa: ARG002
        return self.choice(text)


@dataclass
class Answer:
    """To one request. seeds: of its texts."""

    form: Form
    model: str
    seeds: Sequence[int]
    piece: Piece
    usage_last: bool = False
    """A stream ends with what it took; the pieces before say that they do not, as OpenAI's."""
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.form.prefix}-{secrets.token_hex(12)}"

    def whole(self, results: Sequence[Result], prompts: int) -> dict[str, Any]:
        """prompts: of which the results are, as many of each."""
        choices = [
            {"index": index, **self.form.choice(result.text), **self._end(index, result)}
            for index, result in enumerate(results)
        ]
        return {**self._envelope(self.form.whole, choices), "usage": usage(results, prompts)}

    def first(self, index: int, prompt_tokens: int, given: list[str | None] | None) -> dict[str, Any]:
        """What is sent when a text is accepted. given: an infilling's tokens, None where a mask is."""
        own: dict[str, Any] = {"prompt_tokens": prompt_tokens, "seed": self.seeds[index]}
        if given is not None:
            own["given"] = given
        return self._chunk({"index": index, **self.form.delta("", True), "finish_reason": None, "illada": own})

    def steps(self, index: int, text: str, done: Sequence[Progress]) -> dict[str, Any]:
        """text: that has settled."""
        own = {"length": done[-1].length, "steps": [self._step(one) for one in done]}
        return self._chunk({"index": index, **self.form.delta(text, False), "finish_reason": None, "illada": own})

    def end(self, index: int, text: str, result: Result) -> dict[str, Any]:
        """text: the rest."""
        return self._chunk({"index": index, **self.form.delta(text, False), **self._end(index, result)})

    def usage(self, results: Sequence[Result], prompts: int) -> dict[str, Any]:
        """The last of a stream that asked for it."""
        return {**self._envelope(self.form.part, []), "usage": usage(results, prompts)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._envelope(self.form.part, [choice]), **({"usage": None} if self.usage_last else {})}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _end(self, index: int, result: Result) -> dict[str, Any]:
        own = {
            "finish": result.finish,
            "seed": self.seeds[index],
            "length": result.tokens.numel(),
            "step_count": result.steps,
            "computed_positions": result.computed,
        }
        return {"finish_reason": "length" if result.finish == "length" else "stop", "illada": own}

    def _step(self, done: Progress) -> dict[str, Any]:
        tokens = done.step.tokens.tolist()
        return {
            "number": done.step.number,
            "positions": done.step.positions.tolist(),
            "tokens": tokens,
            "pieces": [self.piece(token) for token in tokens],
            "confidence": [round(one, 6) for one in done.step.confidence.tolist()],
        }


def generated_tokens(result: Result) -> int:
    """The token that ended it among them."""
    return int((result.order >= 0).sum())


def usage(results: Sequence[Result], prompts: int) -> dict[str, int]:
    """A prompt counts once, however many texts continue it."""
    of_each = len(results) // prompts
    prompt = sum(result.tokens.numel() - generated_tokens(result) for result in results[::of_each])
    completion = sum(map(generated_tokens, results))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

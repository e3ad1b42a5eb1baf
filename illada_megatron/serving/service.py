"""What each address of the server does."""

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from illada_megatron.config import ConfigError
from illada_megatron.generation import Generator, Settings
from illada_megatron.generation.constraining import Automaton
from illada_megatron.serving.answers import Answer, Chat, Completion, Form, Infilling
from illada_megatron.serving.bodies import CONSTRAINTS, Body, ChatBody, CompletionBody, InfillBody
from illada_megatron.serving.conversations import Conversations
from illada_megatron.serving.errors import Refused
from illada_megatron.serving.exchange import EventStream, Exchange, while_connected
from illada_megatron.serving.metrics import Metrics
from illada_megatron.serving.options import Options
from illada_megatron.serving.patterns import pattern_search
from illada_megatron.serving.settled import Settled
from illada_megatron.serving.worker import SICK, Inbox, Work, Worker

_GAP = re.compile(r"<mask:0*(\d+)>")


@dataclass(frozen=True)
class _Asked:
    """A request, understood."""

    works: list[Work]
    inbox: Inbox
    seeds: list[int]
    prompts: int


@dataclass(frozen=True)
class _Choice:
    """Of a request and the operator's defaults."""

    settings: dict[str, Any]
    """Arguments of `Settings`."""
    follows: Automaton | None
    """Of its regex or json_schema."""


_Prepare = Callable[[_Choice], _Asked]


class Service:
    """Of one generator; made and called on the event loop."""

    def __init__(self, generator: Generator, options: Options, conversations: Conversations | str) -> None:
        """conversations: or why there are none. Raises ConfigError where a default cannot hold."""
        self._of_defaults = options.defaults.get("regex"), options.defaults.get("json_schema")
        self._follows = _followed(generator, *self._of_defaults)
        self.metrics = Metrics()
        self.worker = Worker(generator, self.metrics, options.most_running, options.most_queued)
        self._generator, self._options, self._conversations = generator, options, conversations
        # tokenizers and templates take time, and one thread at a time
        self._preparing = ThreadPoolExecutor(1, "illada prepare")
        # and automata take more: others' texts do not wait for them
        self._constraining = ThreadPoolExecutor(1, "illada constrain")
        self._began = int(time.time())

    def close(self) -> None:
        self.worker.close()
        self._preparing.shutdown()
        self._constraining.shutdown(cancel_futures=True)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """OpenAI's: continue each prompt, text or token ids, n times."""
        return await self._answered(Completion(), body, request, lambda to: self._continued(body, body.prompts(), to))

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """OpenAI's: the answer to a conversation, as the tokenizer's chat template writes conversations."""
        return await self._answered(Chat(), body, request, lambda to: self._conversation(body, to))

    async def infill(self, body: InfillBody, request: Request) -> Response:
        """Fill in the gaps `<mask:N>` of a text, from both sides. The answer is the whole text."""
        return await self._answered(Infilling(), body, request, lambda to: self._infilled(body, to))

    async def models(self) -> dict[str, Any]:
        """OpenAI's: the one there is."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        """OpenAI's."""
        self._check_model(name)
        return self._model()

    async def health(self) -> JSONResponse:
        """503 where nothing should be sent here: it ends, or step after step fails."""
        failing = self.worker.failed_in_a_row
        status = "stopping" if self.worker.refusing else "failing" if failing >= SICK else "ok"
        state = {
            "status": status,
            "model": self._options.name,
            "running": self.worker.running(),
            "queued": self.worker.queued(),
            "steps": self.worker.steps,
            "failed_steps_in_a_row": failing,
        }
        return JSONResponse(state, 200 if status == "ok" else 503)

    async def prometheus(self) -> Response:
        """Metrics in Prometheus's format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _answered(self, form: Form, body: Body, request: Request, prepare: _Prepare) -> Response:
        self._check_model(body.model)
        asked = await self._prepared(body, prepare)
        usage = body.stream_options is not None and body.stream_options.include_usage
        answer = Answer(form, self._options.name, asked.seeds, self._generator.tokenizer.piece, usage)
        firsts = [self._first(answer, work) for work in asked.works] if body.stream else []  # before a step is made
        exchange = Exchange(self.worker, self.metrics, asked.works, asked.inbox, asked.prompts)
        if not body.stream:
            with exchange:
                results = await while_connected(request, exchange.results())
            return JSONResponse(answer.whole(results, asked.prompts))
        return EventStream(exchange, exchange.chunks(answer, self._settled, firsts))

    async def _prepared(self, body: Body, prepare: _Prepare) -> _Asked:
        """Off the loop: a long text, a template or an automaton takes its time. Raises Refused."""
        loop = asyncio.get_running_loop()
        try:
            chosen = body.chosen(self._options.defaults)
            regex, schema = (chosen.get(name) for name in CONSTRAINTS)
            follows = None
            if (regex, schema) == self._of_defaults:
                follows = self._follows
            elif regex is not None or schema is not None:
                Settings(**chosen)  # what it refuses needs no automaton
                make = partial(self._generator.automaton, regex, schema, apart=True)
                follows = await loop.run_in_executor(self._constraining, make)
            return await loop.run_in_executor(self._preparing, prepare, _Choice(chosen, follows))
        except ValueError as error:
            raise Refused(400, str(error)) from error

    def _continued(self, body: CompletionBody, prompts: Sequence[str | list[int]], choice: _Choice) -> _Asked:
        words = self._generator.tokenizer
        self._check_count(body, len(prompts))  # before any is encoded
        ids = [words.encode(one) if isinstance(one, str) else one for one in prompts]
        if any(self._generator.config.mask_token_id in one for one in ids):
            raise Refused(400, "prompt: holds the mask token: ask /v1/infill for `<mask:N>`", "prompt")
        return self._asked(body, choice, ids)

    def _conversation(self, body: ChatBody, choice: _Choice) -> _Asked:
        if isinstance(self._conversations, str):
            message = f"this server has no chat, ask /v1/completions: {self._conversations}"
            raise Refused(400, message, code="no_chat_template")
        ids = self._conversations.tokens([message.plain() for message in body.messages])
        end = self._conversations.turn_end if choice.follows is None else None
        return self._asked(body, choice, [ids], () if end is None else (end,))

    def _infilled(self, body: InfillBody, choice: _Choice) -> _Asked:
        self._check_gaps(body.prompt)
        ids = self._generator.tokens(body.prompt)
        if self._generator.config.mask_token_id not in ids:
            raise Refused(400, "prompt: has no gap `<mask:N>`, N tokens to fill in, N from 1 up", "prompt")
        for name in ("gen_length", "stop", "stop_pattern"):
            if getattr(body, name) is not None:
                raise Refused(400, f"{name}: an infilling ends when its gaps are filled", name, "unsupported")
        return self._asked(body, choice, [ids])

    def _asked(self, body: Body, choice: _Choice, prompts: list[list[int]], ends: tuple[str, ...] = ()) -> _Asked:
        """ends: stop strings that the request has not given. Raises ValueError, Refused."""
        self._check_count(body, len(prompts))
        search = pattern_search(body.stop_pattern) if body.stop_pattern is not None else None
        inbox, works, seeds = Inbox(), list[Work](), list[int]()
        for ids in prompts:
            settings = self._settings(body, choice.settings, len(ids), ends)
            for one in range(body.n or 1):
                own = replace(settings, seed=settings.seed + one)
                text, decode, constraint = self._generator.text(ids, own, choice.follows)
                works.append(Work(len(works), text, decode, inbox, constraint, search, bool(body.stream)))
                seeds.append(own.seed)
        return _Asked(works, inbox, seeds, len(prompts))

    def _check_count(self, body: Body, prompts: int) -> None:
        n = body.n or 1
        if not 1 <= prompts * n <= self._options.most_texts:
            message = f"prompts times n are {prompts * n}, expected 1 to {self._options.most_texts}"
            raise Refused(400, message, "n" if n > 1 else "prompt")

    def _settings(self, body: Body, chosen: dict[str, Any], prompt_tokens: int, ends: tuple[str, ...]) -> Settings:
        most = self._options.most_tokens
        length = body.length()
        if length is not None and most is not None and length > most:
            raise Refused(400, f"{length} tokens were asked for, this server generates at most {most}", "max_tokens")
        settings = Settings(**chosen)
        if length is None:  # what nobody asked for may be shorter
            room = max(1, self._generator.config.max_sequence_length - prompt_tokens)
            settings = replace(settings, gen_length=min(settings.gen_length, room, most or room))
        if body.seed is None and "seed" not in self._options.defaults:
            settings = replace(settings, seed=secrets.randbits(48))  # whoever samples again wants another text
        return replace(settings, stop=(*settings.stop, *ends))

    def _settled(self, work: Work) -> Settled:
        settings, words = work.text.settings, self._generator.tokenizer
        if work.text.infill:
            return Settled(words, work.decode)
        ends = self._generator.words.ends(settings)
        return Settled(words, work.decode, settings.stop, ends, hold=work.search is not None)

    def _first(self, answer: Answer, work: Work) -> dict[str, Any]:
        given = None
        if work.text.infill:
            masked = (work.text.tokens == work.text.mask_token_id).tolist()
            pieces = map(self._generator.tokenizer.piece, work.text.tokens.tolist())
            given = [None if mask else piece for mask, piece in zip(masked, pieces, strict=True)]
        return answer.first(work.index, work.text.given, given)

    def _check_gaps(self, prompt: str) -> None:
        """Before a list of so many masks is made, or so many pieces are encoded."""
        room = self._generator.config.max_sequence_length
        most = min(self._options.most_tokens or room, room)
        # Python reads numbers of 4,300 digits, and no more
        masks = sum(max(1, int(one)) if len(one) < 10 else 10**9 for one in _GAP.findall(prompt))
        if masks > most:
            message = f"the gaps ask for {masks} tokens, this server generates at most {most}: ask for fewer"
            raise Refused(400, message, "prompt")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._options.name):
            raise Refused(
                404, f"model: there is {self._options.name!r} alone, found {name!r}", "model", "model_not_found"
            )

    def _model(self) -> dict[str, Any]:
        own = {"id": self._options.name, "object": "model", "created": self._began, "owned_by": "illada-megatron"}
        return {**own, "max_model_len": self._generator.config.max_sequence_length}


def _followed(generator: Generator, regex: str | None, schema: str | None) -> Automaton | None:
    """By all texts that follow nothing else. Raises ConfigError."""
    if regex is None and schema is None:
        return None
    try:
        return generator.automaton(regex, schema)
    except ValueError as error:
        raise ConfigError(f"--default: {error}") from error

"""One request and its texts: waiting for them, whole or as they come, for as long as the client is there."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from illada_megatron.generation import Result
from illada_megatron.serving.answers import Answer, generated_tokens
from illada_megatron.serving.errors import Refused, error_body
from illada_megatron.serving.metrics import Metrics
from illada_megatron.serving.settled import Settled
from illada_megatron.serving.worker import Event, Failed, Inbox, Progress, Work, Worker

_PING_SECONDS = 15.0
T = TypeVar("T")


class Exchange:
    """The texts of a request, while a `with` lasts: those unfinished at its end are worked on no more."""

    def __init__(self, worker: Worker, metrics: Metrics, works: Sequence[Work], inbox: Inbox, prompts: int) -> None:
        """prompts: of which the works are, as many of each. Raises Refused where the server takes no more."""
        self.works, self.prompts = list(works), prompts
        self.left = set(works)
        self._worker, self._metrics, self._inbox = worker, metrics, inbox
        worker.submit(self.works)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._worker.cancel(list(self.left))
        for _ in self.left:
            self._metrics.ended("cancelled")

    async def take(self, seconds: float | None = None) -> list[tuple[Work, Event]]:
        """What has happened; nothing where it took longer."""
        try:
            async with asyncio.timeout(seconds):
                events = await self._inbox.take()
        except TimeoutError:
            return []
        for work, event in events:
            if isinstance(event, Failed):
                self._metrics.ended("failed")
            elif isinstance(event, Result):
                generated = generated_tokens(event)
                self._metrics.ended(event.finish, event.tokens.numel() - generated, generated)
            if not isinstance(event, Progress):
                self.left.discard(work)
        return events

    async def results(self) -> list[Result]:
        """In the order of the works. Raises Refused where one of them fails."""
        found: dict[Work, Result] = {}
        while self.left:
            for work, event in await self.take():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Result):
                    found[work] = event
        return [found[work] for work in self.works]

    async def chunks(
        self, answer: Answer, settled: Callable[[Work], Settled], firsts: Sequence[dict[str, Any]]
    ) -> AsyncIterator[bytes]:
        """Server-sent events, as OpenAI's: steps that happened since the client last read are one."""
        found: dict[Work, Result] = {}
        texts = {work: settled(work) for work in self.works}
        for first in firsts:
            yield _event(first)
        while self.left:
            events = await self.take(_PING_SECONDS)
            if not events:
                yield b": the text waits, or a step is long\n\n"
            for work in dict.fromkeys(work for work, _ in events):
                own = [event for one, event in events if one is work]
                try:
                    made, ended = _made(answer, work.index, own, texts[work])
                except Refused as error:
                    yield _event(error_body(error.status_code, str(error.detail), error.param, error.code))
                    return
                if ended is not None:
                    found[work] = ended
                for chunk in made:
                    yield _event(chunk)
        if answer.usage_last:
            yield _event(answer.usage([found[work] for work in self.works], self.prompts))
        yield b"data: [DONE]\n\n"


def _made(answer: Answer, index: int, events: list[Event], text: Settled) -> tuple[list[dict[str, Any]], Result | None]:
    """Chunks of what has happened to one text, and its end. Raises Refused where it failed."""
    chunks, ended = [], None
    done = [event for event in events if isinstance(event, Progress)]
    if done:
        chunks.append(answer.steps(index, text.more([token for one in done for token in one.settled]), done))
    for event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Result):
            ended = event
            try:
                rest = text.rest(event.text)
            except ValueError as error:
                raise Refused(500, str(error), code="stream") from error
            chunks.append(answer.end(index, rest, event))
    return chunks, ended


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


class EventStream(StreamingResponse):
    """The chunks of an exchange, which ends with it."""

    def __init__(self, exchange: Exchange, chunks: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._exchange:
            await super().__call__(scope, receive, send)


async def while_connected(request: Request, asked: Coroutine[Any, Any, T]) -> T:
    """Its result; cancelled where the client leaves. Raises Refused then, which nobody reads."""
    task = asyncio.ensure_future(asked)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refused(499, "the client has left")
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""What every request passes before it is read: its key, its rate, its kind; and it is counted."""

import asyncio
import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from illada_megatron.serving.errors import Refused, error_body
from illada_megatron.serving.metrics import Metrics
from illada_megatron.serving.options import Options

_MOST_CALLERS = 10_000
_LEFT = 499
"""Status of a request whose client left before the answer began (nginx's)."""


class Rate:
    """A bucket for each caller: `per_minute` requests at once, refilled evenly."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> (requests left, when)

    def wait_seconds(self, caller: str, now: float) -> float:
        """0: it may ask, and has; else how long until it may."""
        left, when = self._buckets.pop(caller, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - when) * self.per_minute / 60)
        allowed = left >= 1
        self._buckets[caller] = (left - allowed, now)
        if len(self._buckets) > _MOST_CALLERS:
            self._buckets.popitem(last=False)  # the one that has not asked for longest
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, options: Options, metrics: Metrics, paths: Sequence[str]) -> None:
        """paths: that are counted by their name."""
        self._app, self._options, self._metrics = app, options, metrics
        self._paths = frozenset(paths)
        self._keys = [_digest(key.encode("utf-8", "surrogateescape")) for key in options.keys]
        self._rate = Rate(options.per_minute) if options.per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), _LEFT

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._in_time(receive), counted)
        except Refused as error:
            body = error_body(error.status_code, str(error.detail), error.param, error.code)
            await JSONResponse(body, error.status_code, error.headers)(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.answered(path, status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Raises Refused."""
        headers = Headers(scope=scope)
        key = self._key(headers) if self._keys and scope["path"].startswith(("/v1/", "/metrics")) else None
        if scope["method"] != "POST":
            return
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # what pages of other origins may send without being asked is of another type
            raise Refused(415, "the body must be JSON: set Content-Type to application/json")
        if self._rate is not None:
            caller = key.hex() if key is not None else scope["client"][0] if scope["client"] else ""
            if seconds := self._rate.wait_seconds(caller, time.monotonic()):
                message = f"more than {self._options.per_minute} requests a minute"
                raise Refused(429, message, code="rate_limit_exceeded", retry_after=math.ceil(seconds))

    def _key(self, headers: Headers) -> bytes:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = _digest(given.strip().encode("latin-1"))  # the bytes of a header, as starlette reads them
        known = [hmac.compare_digest(found, one) for one in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            message = "an API key of this server is needed: Authorization: Bearer KEY"
            raise Refused(401, message, code="invalid_api_key")
        return found

    def _in_time(self, receive: Receive) -> Receive:
        """A client that sends its body for ever holds nothing for ever."""
        whole = False

        async def received() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(self._options.body_seconds):
                    message = await receive()
            except TimeoutError as error:
                waited = f"no more of the body has come for {self._options.body_seconds:g} seconds"
                raise HTTPException(408, waited) from error
            whole = not message.get("more_body", False)
            return message

        return received


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

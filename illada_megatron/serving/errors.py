"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_NO_FIELDS = ("body", "str", "int")
"""In a place that pydantic names: where the body is, which of several types."""
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(HTTPException):
    """A request that is not answered: what was found and what to do, the field it is about, and a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """retry_after: seconds."""
        super().__init__(status, message, {"Retry-After": str(retry_after)} if retry_after is not None else None)
        self.param = param
        self.code = code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    message = message.encode(
        errors="backslashreplace"
    ).decode()  # half a character, which a request may name a field by
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def answer_refused(_request: Request, error: Exception) -> JSONResponse:
    """Ours, and starlette's own (no such path, no such method, body too large)."""
    assert isinstance(error, HTTPException)
    body = error_body(error.status_code, str(error.detail), getattr(error, "param", None), getattr(error, "code", None))
    return JSONResponse(body, error.status_code, error.headers)


async def answer_invalid(_request: Request, error: Exception) -> JSONResponse:
    """A body that is no JSON, or not the one that is expected: one of its faults."""
    assert isinstance(error, RequestValidationError)
    # of a field that may be of several types, not that it is none of the others
    first = min(error.errors(), key=lambda one: one["type"].endswith("_type"))
    place = [str(part) for part in first["loc"] if part not in _NO_FIELDS and "[" not in str(part)]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "json_invalid":
        return JSONResponse(
            error_body(400, f"the body is not valid JSON: {context['error']}", code="invalid_json"), 400
        )
    param = context.get("param") or ".".join(place).encode(errors="backslashreplace").decode() or None
    if kind == "extra_forbidden":
        message = f"{param}: no such field; GET /openapi.json lists those there are"
        return JSONResponse(error_body(400, message, param, "unknown_parameter"), 400)
    message = first["msg"] if kind == "unsupported" else f"{param or 'the body'}: {first['msg']}"
    return JSONResponse(error_body(400, message, param, "unsupported" if kind == "unsupported" else None), 400)


async def answer_defect(_request: Request, _error: Exception) -> JSONResponse:
    """What nobody expected; its traceback is the log's, and not a stranger's to read."""
    return JSONResponse(error_body(500, "the server failed to answer; its log has the reason"), 500)

"""The addresses of a server."""

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from illada_megatron.serving.errors import answer_defect, answer_invalid, answer_refused
from illada_megatron.serving.guard import Guard
from illada_megatron.serving.options import Options
from illada_megatron.serving.service import Service

_PAGE = Path(__file__).with_name("page.html")


def made_app(service: Service, options: Options) -> FastAPI:
    """ASGI, for any server; no documentation page, which would ask other servers for its scripts."""
    app = FastAPI(title="illada serve", docs_url=None, redoc_url=None, max_body_size=options.most_bytes)
    posts: dict[str, Callable[..., Any]] = {
        "/v1/completions": service.completions,
        "/v1/chat/completions": service.chat,
        "/v1/infill": service.infill,
    }
    gets: dict[str, Callable[..., Any]] = {
        "/v1/models": service.models,
        "/health": service.health,
        "/metrics": service.prometheus,
    }
    for path, answer in posts.items():
        app.add_api_route(path, answer, methods=["POST"], response_model=None)
    for path, answer in gets.items():
        app.add_api_route(path, answer, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", service.model, methods=["GET"], response_model=None)
    page = _page()
    app.add_api_route("/", lambda: page, methods=["GET"], include_in_schema=False, response_model=None)
    app.add_exception_handler(HTTPException, answer_refused)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(Exception, answer_defect)
    app.add_middleware(Guard, options=options, metrics=service.metrics, paths=["/", *posts, *gets])
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(options.allowed_hosts))  # a name that leads here only
    return app


def _page() -> HTMLResponse:
    """Nothing runs in it but its own script, and it asks nobody but this server."""
    content = _PAGE.read_text(encoding="utf-8")
    own = {name: _hash(re.findall(f"<{name}>(.*?)</{name}>", content, re.DOTALL)[0]) for name in ("style", "script")}
    policy = (
        f"default-src 'none'; style-src '{own['style']}'; script-src '{own['script']}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(content, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what may be used."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

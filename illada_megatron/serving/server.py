"""A server on a port, from its start to its end."""

import asyncio
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from illada_megatron.config import ConfigError
from illada_megatron.generation import Generator
from illada_megatron.serving.app import made_app
from illada_megatron.serving.conversations import Conversations
from illada_megatron.serving.errors import Refused
from illada_megatron.serving.options import Options
from illada_megatron.serving.service import Service

_TELL_SECONDS = 5
"""For the answers of those that the grace has not been enough for."""
_MOST_FILES = 1 << 16
_MORE_CONNECTIONS = 256
"""Than texts may wait or run: to be told so, and to look."""
Ready = Callable[[Callable[[], None]], None]


def listening(host: str, port: int) -> socket.socket:
    """A socket that does. Raises ConfigError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}: give an address of this machine") from error
    try:
        made = socket.create_server(address[:2], family=family, backlog=4096)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"--host {host} --port {port}: {why}: give another") from error
    return made


def serve(
    generator: Generator,
    options: Options,
    conversations: Conversations | str,
    listener: socket.socket,
    ready: Ready,
) -> None:
    """Until SIGTERM or SIGINT: then nothing more is accepted, what was accepted is finished within the grace or told
    that it is not. A second signal does not wait. conversations: or why there are none. ready: called when it listens,
    with what a signal calls."""
    _allow_files()
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # connections inherit it: who has not read for so long is disconnected, as who has left
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(options.unread_seconds * 1000))
    asyncio.run(_serve(generator, options, conversations, listener, ready))


async def _serve(
    generator: Generator,
    options: Options,
    conversations: Conversations | str,
    listener: socket.socket,
    ready: Ready,
) -> None:
    service = Service(generator, options, conversations)
    try:
        server = _Server(service, options)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, server.end)
        ready(server.end)
        await server.serve([listener])
    finally:
        service.close()


class _Server(uvicorn.Server):
    """uvicorn's, that tells the worker when it ends, and whose process ends with 0 then."""

    def __init__(self, service: Service, options: Options) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config = uvicorn.Config(
            made_app(service, options),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # anybody may write them
            server_header=False,
            # each may hold a body, or what it has not read of an answer
            limit_concurrency=options.most_queued + options.most_running + _MORE_CONNECTIONS,
            timeout_graceful_shutdown=int(options.grace_seconds) + _TELL_SECONDS,
        )
        super().__init__(config)
        self._worker, self._grace = service.worker, options.grace_seconds

    def end(self) -> None:
        """A second time: now."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The loop hears them."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.refusing = True
        message = f"the server ended, and {self._grace:g} seconds were not enough to finish this: ask again"
        late = asyncio.get_running_loop().call_later(
            self._grace, self._worker.fail_rest, Refused(503, message, code="stopping")
        )
        await super().shutdown(sockets)
        late.cancel()


def _allow_files() -> None:
    """A connection is an open file, and a shell allows a process 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

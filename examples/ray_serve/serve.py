"""Replicas of `illada serve`, each a process with a device of its own, behind one address of Ray Serve.

    pip install 'illada-megatron[serve]' 'ray[serve]'
    python examples/ray_serve/serve.py --checkpoint runs/my/checkpoints --replicas 8

Ray sends a request to a replica that has little to do, starts anew those that end, and spans machines where `ray start`
has joined them. Host names, keys and TLS are for what stands in front of it.
"""

from contextlib import AsyncExitStack
from typing import Annotated

import typer
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from illada_megatron.generation import Generator
from illada_megatron.serving.app import made_app
from illada_megatron.serving.conversations import Conversations
from illada_megatron.serving.options import Options
from illada_megatron.serving.service import Service


class Replica:
    """An ASGI application; the model is opened where it is first asked, on the loop that will ask."""

    def __init__(self, checkpoint: str, tokenizer: str | None, device: str, chat: bool, options: Options) -> None:
        self._opened = (checkpoint, device, tokenizer)
        self._chat, self._options = chat, options
        self._stack = AsyncExitStack()
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            generator = self._stack.enter_context(Generator.open(*self._opened))
            assert generator.tokenizer_path is not None
            talks = Conversations(generator.tokenizer_path, None) if self._chat else "it was started without --chat"
            service = Service(generator, self._options, talks)
            self._stack.callback(service.close)
            self._app = made_app(service, self._options)
        await self._app(scope, receive, send)


def main(
    checkpoint: Annotated[str, typer.Option(help="As of `illada serve`; a place that all machines read.")],
    tokenizer: Annotated[str | None, typer.Option(help="As of `illada serve`.")] = None,
    replicas: Annotated[int, typer.Option(min=1)] = 2,
    gpus: Annotated[float, typer.Option(help="Of a replica; 0: it computes on CPUs.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="With the tokenizer's chat template.")] = False,
    running: Annotated[int, typer.Option(help="Requests that a replica is given at once.")] = 64,
    port: Annotated[int, typer.Option()] = 8000,
) -> None:
    """Start the replicas, and stay until Ctrl-C."""
    options = Options("illada", {"gen_length": 128}, most_running=running)
    device = "cuda" if gpus else "cpu"

    def application() -> Replica:
        return Replica(checkpoint, tokenizer, device, chat, options)

    deployment = serve.deployment(serve.ingress(application)())
    placed = deployment.options(
        num_replicas=replicas, max_ongoing_requests=running, ray_actor_options={"num_gpus": gpus}
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(placed.bind(), name="illada", blocking=True)


if __name__ == "__main__":
    typer.run(main)

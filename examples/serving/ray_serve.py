"""Several servers of one model, each a process with a device of its own, behind one address of Ray Serve (2.60).

    pip install 'illada-megatron[serve]' 'ray[serve]>=2.60'
    python examples/serving/ray_serve.py --checkpoint runs/my/checkpoints --replicas 8

On several machines, first `ray start --head` on this one and `ray start --address THIS:6379` on each of the others.
docs/serving.md, "More than one machine".
"""

import os
from contextlib import ExitStack
from typing import Annotated

import ray
import typer
from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from illada_megatron.generation import Generator
from illada_megatron.serving.app import made_app
from illada_megatron.serving.conversations import conversations_or_why
from illada_megatron.serving.options import Options
from illada_megatron.serving.service import Service

_APPLICATION = "illada"
_PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # Ray's 5 are over before its imports on a machine with other work
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_worker_niceness": "0",  # Ray's is 15: behind all other work
}
"""Of a Ray that is started here; one that runs already has its own."""


class _OneOfMany(Service):
    async def prometheus(self) -> Response:
        """Of all replicas, whichever is asked."""
        handle = serve.get_deployment_handle("Replica", _APPLICATION)
        found = await handle.broadcast("metrics").results_async(timeout_s=10, return_exceptions=True)
        texts = dict(one for one in found if not isinstance(one, BaseException))  # one that ends says nothing
        return Response(_labelled(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


@serve.deployment
@serve.ingress()
class Replica:
    """`illada serve` without its socket."""

    def __init__(self, checkpoint: str, tokenizer: str | None, device: str, options: Options) -> None:
        self._stack, self._options = ExitStack(), options
        generator = self._stack.enter_context(Generator.open(checkpoint, device, tokenizer))
        self._service = _OneOfMany(generator, options, conversations_or_why(generator, None))
        self._stack.callback(self._service.close)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return made_app(self._service, self._options)

    async def check_health(self) -> None:
        """Where it raises three times, Ray starts another in its place."""
        answer = await self._service.health()
        if answer.status_code != 200:
            raise RuntimeError(bytes(answer.body).decode())

    async def metrics(self) -> tuple[str, str]:
        return serve.get_replica_context().replica_id.unique_id, self._service.metrics.text().decode()

    def __del__(self) -> None:
        self._stack.close()


def _labelled(texts: dict[str, str]) -> str:
    """Of each replica, in Prometheus's format -> of all, with its name in a label."""
    lines: dict[str, list[str]] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            of_family = lines.setdefault(family.name, [f"# TYPE {family.name} {family.type}"])
            for sample in family.samples:
                labels = ",".join(f'{name}="{value}"' for name, value in {"replica": replica, **sample.labels}.items())
                of_family.append(f"{sample.name}{{{labels}}} {sample.value!r}")
    return "".join(f"{line}\n" for of_family in lines.values() for line in of_family)


def main(
    checkpoint: Annotated[str, typer.Option(help="As of `illada serve`; at a place that all machines read.")],
    tokenizer: Annotated[str | None, typer.Option(help="As of `illada serve`.")] = None,
    replicas: Annotated[int, typer.Option(min=1)] = 2,
    gpus: Annotated[float, typer.Option(min=0, help="Of a replica; 0: it computes on CPUs.")] = 1.0,
    cpus: Annotated[float, typer.Option(min=0, help="Of a replica.")] = 1.0,
    most_running: Annotated[int, typer.Option(min=1, help="Requests that one replica is given at once.")] = 64,
    most_queued: Annotated[int, typer.Option(min=1, help="Requests that wait; more are answered 503.")] = 1024,
    port: Annotated[int, typer.Option(min=1, max=65535, help="At 127.0.0.1.")] = 8000,
) -> None:
    """Start the replicas, and stay until Ctrl-C."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    ray.init(include_dashboard=False)
    options = Options(
        "illada", {"gen_length": 128}, allowed_hosts=("localhost", "127.0.0.1"), most_running=most_running
    )
    replica = Replica.options(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=most_running,
        max_queued_requests=most_queued,
        graceful_shutdown_timeout_s=options.grace_seconds,
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(replica.bind(checkpoint, tokenizer, "cuda" if gpus else "cpu", options), name=_APPLICATION, blocking=True)


if __name__ == "__main__":
    typer.run(main)

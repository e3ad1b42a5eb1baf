"""Counts and times for Prometheus, of one server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STEP_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_REQUEST_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Methods may be called by any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "illada_requests", "Requests answered, by path and status", ["path", "status"], registry=self._registry
        )
        self._texts = Counter("illada_texts", "Texts that ended, by how", ["finish"], registry=self._registry)
        self._prompt = Counter("illada_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self._generated = Counter("illada_generated_tokens", "Tokens generated", registry=self._registry)
        self._computed = Counter(
            "illada_computed_positions", "Positions that went through the layers", registry=self._registry
        )
        self._step = Histogram("illada_step_seconds", "A step", registry=self._registry, buckets=_STEP_SECONDS)
        self._seconds = Histogram(
            "illada_request_seconds",
            "From a request to the end of its answer",
            ["path"],
            registry=self._registry,
            buckets=_REQUEST_SECONDS,
        )
        self._queued = Gauge("illada_queued_texts", "Texts that wait", registry=self._registry)
        self._running = Gauge("illada_running_texts", "Texts in work", registry=self._registry)

    def watch(self, queued: Callable[[], int], running: Callable[[], int]) -> None:
        """Asked when somebody looks."""
        self._queued.set_function(queued)
        self._running.set_function(running)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """status: 499 where the client has left."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def ended(self, finish: str, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        """finish: as `Result.finish`; failed, cancelled."""
        self._texts.labels(finish).inc()
        self._prompt.inc(prompt_tokens)
        self._generated.inc(generated_tokens)

    def stepped(self, seconds: float, computed: int) -> None:
        self._step.observe(seconds)
        self._computed.inc(computed)

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)

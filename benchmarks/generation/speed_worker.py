"""A process of the speed benchmark: one variant, one block at a time, so that the variants can take turns."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from benchmarks.generation.shapes import Shape
from benchmarks.measuring.processes import Timing, timed

AUTHORS, ONE, MANY = "the authors' loop", "ours, one prompt", "ours, all prompts"
PREFIX, DUAL = "ours, prefix cache", "ours, dual cache"
BARE, BARE_DUAL = "bare products", "bare products, dual cache"
LLAMA = "llama.cpp"
VARIANTS = (AUTHORS, ONE, MANY, PREFIX, DUAL, BARE, BARE_DUAL)


def variants() -> tuple[str, ...]:
    """With llama.cpp where its Python package is installed."""
    return (*VARIANTS, LLAMA) if find_spec("llama_cpp") else VARIANTS


class Subject(Protocol):
    """Who generates."""

    def warm_up(self) -> None:
        """A step, of which nothing is left."""

    def block(self) -> None:
        """All steps of the next block of each text."""

    def texts(self) -> list[list[int]]:
        """Tokens of each."""


@dataclass
class Found:
    """What a variant's process found."""

    who: str
    environment: dict[str, Any]
    texts: list[list[int]] = field(default_factory=list)
    blocks: list[Timing] = field(default_factory=list)
    peak_memory_bytes: int = 0
    """Of the process."""

    def to_json(self, shape: Shape) -> dict[str, Any]:
        """Units are in the names; medians over the blocks."""
        texts = max(len(self.texts), 1)
        tokens, steps = texts * shape.block_length, shape.steps
        seconds = median(one.seconds for one in self.blocks)
        return {
            "who": self.who,
            "texts": texts,
            "block_seconds": [one.seconds for one in self.blocks],
            "block_cpu_seconds": [one.cpu_seconds for one in self.blocks],
            "tokens_per_second": tokens / seconds,
            "cpu_seconds_per_token": median(one.cpu_seconds for one in self.blocks) / tokens,
            "step_seconds": seconds / steps,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def write(connection: Connection, shape: Shape, folder: Path) -> None:
    """The model's weights, for everyone."""
    from benchmarks.generation.authors_loop import write_model

    write_model(folder, shape)
    if LLAMA in variants():
        from benchmarks.generation.llama_loop import write_gguf

        write_gguf(folder)
    connection.send("written")


def measure(connection: Connection, who: str, shape: Shape, folder: Path, threads: int) -> None:
    """Answer "warm up" and "block" with a Timing, "finish" with what was found."""
    import torch

    torch.set_num_threads(threads)
    with _subject(who, shape, folder, threads) as subject:
        subject.warm_up()
        found = Found(who, {"torch": torch.__version__, "threads": torch.get_num_threads()})
        connection.send("ready")
        while connection.recv()[0] != "finish":
            found.blocks.append(timed(subject.block))
            connection.send(found.blocks[-1])
        found.texts = subject.texts()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    found.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    connection.send(found)


@contextmanager
def _subject(who: str, shape: Shape, folder: Path, threads: int) -> Iterator[Subject]:
    if who == AUTHORS:
        from benchmarks.generation.authors_loop import AuthorsLoop

        yield AuthorsLoop(folder, shape)
    elif who == LLAMA:
        from benchmarks.generation.llama_loop import LlamaLoop

        yield LlamaLoop(folder, shape, threads)
    elif who in (BARE, BARE_DUAL):
        from benchmarks.generation.bare_products import BareProducts

        yield BareProducts(shape, cached=who == BARE_DUAL)
    else:
        from illada_megatron.generation.opening import open_stage

        overrides = [f"runtime.num_threads={threads}", "training.precision=fp32"]
        with open_stage(folder, "cpu", overrides=overrides) as opened:
            from benchmarks.generation.engine_blocks import EngineBlocks
            from illada_megatron.generation.layers import LayerModel

            model = LayerModel(opened.stage, opened.config, opened.run)
            prompts = shape.prompts if who == MANY else (shape.prompt,)
            yield EngineBlocks(model, shape, prompts, {PREFIX: "prefix", DUAL: "dual"}.get(who, "none"))

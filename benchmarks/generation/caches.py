"""What every cache and every rule of revealing saves, and what it changes, on a trained model.

    make demo; python -m benchmarks.generation.caches

Texts are continued from held-out prompts. Full decoding (no cache, a token a step) is what the others are compared
with: positions that go through the layers, CPU seconds, share of equal tokens, and the held-out bound of prompt and
continuation together (the noise of `illada evaluate`, every way with the same). The last line is JSON.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.generation.draw_caches import draw
from benchmarks.measuring.bars import at_least, show_bars, verdict
from benchmarks.measuring.machine import commit, cpu_model
from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.shards.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from illada_megatron.diffusion.held_out import HeldOutSamples
from illada_megatron.generation import Engine, Model, Part, Settings, Text, Words
from illada_megatron.generation.opening import open_stage
from illada_megatron.generation.settings import Cache, Reveal

_FEWER_PASSES = 3.0
_BATCH = 32
"""Samples of the bound, in a pass."""


@dataclass(frozen=True)
class Way:
    """How texts were continued, and what came of it."""

    settings: Settings
    tokens: list[list[int]]
    """[texts][s]"""
    steps: int
    computed: int
    """Positions that went through the layers."""
    cpu_seconds: float


def main(
    checkpoint: Annotated[Path, typer.Option(help="A run's checkpoints.")] = Path("demo/run/checkpoints"),
    held_out: Annotated[Path, typer.Option(help="Shard of text that it has not seen.")] = Path("demo/shards/heldout"),
    texts: Annotated[int, typer.Option(min=1)] = 16,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 64,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 64,
    block_length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 32,
    fixed_length: Annotated[bool, typer.Option(help="All masks are there from the start.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Of the bound, spread over the texts.")] = 512,
    plot: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
) -> None:
    """Measure every cache with every rule of revealing.

    Example: python -m benchmarks.generation.caches --fixed-length --plot caches.png
    """
    report: dict[str, Any] = {
        "benchmark": "caches",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "settings": {"texts": texts, "prompt_length": prompt_length, "gen_length": gen_length}
        | {"block_length": block_length, "fixed_length": fixed_length, "samples": samples},
    }
    settings = Settings(
        gen_length=gen_length, block_length=block_length, steps=block_length, fixed_length=fixed_length, eos="never"
    )
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    ways, bounds = [], []
    with open_stage(checkpoint, "cpu") as opened:
        from illada_megatron.generation.layers import LayerModel

        model, mask = LayerModel(opened.stage, opened.config, opened.run), opened.config.model.mask_token_id
        for way in _continued(model, mask, _prompts(held_out, texts, prompt_length), settings):
            ways.append(way)
            bounds.append(_bound(model, mask, way.tokens, samples))
            console.print(f"{way.settings.cache}, {way.settings.reveal}: {way.cpu_seconds:.1f} CPU s")
    report["results"] = [_compared(way, bound, ways[0], bounds[0]) for way, bound in zip(ways, bounds, strict=True)]
    (chosen,) = (one for one in report["results"] if (one["cache"], one["reveal"]) == ("prefix", "threshold"))
    name = f"full decoding / threshold {settings.threshold:g} with prefix cache: position-passes"
    report |= verdict({name: at_least(_FEWER_PASSES, chosen["times_fewer_position_passes"])})
    _show(console, report["results"])
    show_bars(console, report["bars"])
    if plot is not None:
        draw(report["results"], plot)
    print(json.dumps(report))


def _prompts(held_out: Path, texts: int, length: int) -> list[list[int]]:
    """Evenly spread over the shard."""
    shard = IndexedDataset(held_out)
    total = shard.num_tokens
    return [shard.read(number * (total - length) // texts, length).tolist() for number in range(texts)]


def _continued(model: Model, mask: int, prompts: list[list[int]], settings: Settings) -> Iterator[Way]:
    """In every way, full decoding first."""
    engine = Engine(model, Words(mask))
    for cache, reveal in product(get_args(Cache), get_args(Reveal)):
        chosen = replace(settings, cache=cache, reveal=reveal)
        jobs = [engine.add(Text(torch.tensor(prompt), chosen, mask)) for prompt in prompts]
        started = time.process_time()
        for _ in engine.run():
            pass
        seconds = time.process_time() - started
        texts, steps = [job.text.tokens.tolist() for job in jobs], sum(job.text.step for job in jobs)
        yield Way(chosen, texts, steps, sum(job.computed for job in jobs), seconds)


def _bound(model: Model, mask: int, texts: list[list[int]], num_samples: int) -> float:
    """Nats a token of the texts, each a window, under the noise of `illada evaluate`; the same for every way."""
    length = len(texts[0])
    with tempfile.TemporaryDirectory(prefix="illada-bench-") as folder:
        with IndexedDatasetWriter(Path(folder) / "texts", model.vocab_size) as writer:
            for text in texts:
                writer.add(np.array(text, np.int32), [length])
        corpus = Corpus([Path(folder) / "texts"], length, 0, shuffle=False, vocab_size=model.vocab_size)
        samples = HeldOutSamples([corpus], num_samples, 0, mask)
        nats = 0.0
        for first in range(0, num_samples, _BATCH):
            batch = samples.batch(range(first, min(first + _BATCH, num_samples)))
            masked = batch.loss_weight > 0
            parts = [Part(row, at.nonzero().flatten()) for row, at in zip(batch.tokens, masked, strict=True)]
            loss = F.cross_entropy(model.logits(parts), batch.labels[masked], reduction="none")
            nats += float((loss * batch.loss_weight[masked]).sum(dtype=torch.float64))
    return nats / (num_samples * length)


def _compared(way: Way, bound: float, full: Way, full_bound: float) -> dict[str, Any]:
    """Units are in the names."""
    generated = slice(-way.settings.gen_length, None)
    tokens, expected = (torch.tensor(one.tokens)[:, generated] for one in (way, full))
    return {
        "cache": way.settings.cache,
        "reveal": way.settings.reveal,
        "steps": way.steps,
        "position_passes": way.computed,
        "times_fewer_position_passes": full.computed / way.computed,
        "cpu_seconds": way.cpu_seconds,
        "times_fewer_cpu_seconds": full.cpu_seconds / way.cpu_seconds,
        "equal_tokens": float((tokens == expected).double().mean()),
        "bound_nats_per_token": bound,
        "bound_change": bound - full_bound,
    }


def _show(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table(title="Beside full decoding (none, steps)", title_justify="left")
    for heading in ("cache", "reveal"):
        table.add_column(heading)
    for heading in ("steps", "passes", "times fewer", "CPU s", "times fewer", "equal tokens", "bound", "change"):
        table.add_column(heading, justify="right")
    for one in results:
        table.add_row(
            one["cache"],
            one["reveal"],
            f"{one['steps']}",
            f"{one['position_passes']:,}",
            f"{one['times_fewer_position_passes']:.2f}",
            f"{one['cpu_seconds']:.1f}",
            f"{one['times_fewer_cpu_seconds']:.2f}",
            f"{100 * one['equal_tokens']:.1f} %",
            f"{one['bound_nats_per_token']:.3f}",
            f"{one['bound_change']:+.3f}",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

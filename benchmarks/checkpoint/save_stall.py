"""How long a run waits for a checkpoint, and how long the checkpoint takes: ours and megatron-core's, written at once
and while the run goes on. See benchmarks/README.md.

python -m benchmarks.checkpoint.save_stall --directory /data/scratch --rounds 5"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

BAR = 0.1
CONFIG = (
    *("model.num_layers=8", "model.hidden_size=1024", "model.ffn_hidden_size=3584", "model.num_attention_heads=16"),
    *("model.num_query_groups=4", "model.vocab_size=32000", "data.sequence_length=256", "training.micro_batch_size=1"),
    *("training.global_batch_size=1", "training.precision=fp32", "runtime.device=cpu"),
)
MINIATURE = (
    *("model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4", "model.vocab_size=256"),
    "data.sequence_length=32",
)


@dataclass(frozen=True)
class Save:
    """One save: how long the caller waited, and until it was durable (s)."""

    stall: float
    seconds: float


def main(
    directory: Annotated[Path | None, typer.Option(help="where to write; default: the temporary directory")] = None,
    rounds: Annotated[int, typer.Option(help="rounds; in each, every variant saves once")] = 5,
    layers: Annotated[int, typer.Option(min=1, help="layers of the model; 8 are 2 GB of checkpoint")] = 8,
    tiny: Annotated[bool, typer.Option("--tiny", help="a miniature of the model, to try the script")] = False,
) -> None:
    """The last line of standard output is JSON."""
    from corpus import write_corpus

    from illada_megatron.config import load_config
    from illada_megatron.runtime import runtime

    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        place = Path(name)
        corpus = write_corpus(place / "corpus")
        shape = [*CONFIG, *(MINIATURE if tiny else ()), f"model.num_layers={layers}"]
        config = load_config(None, [*shape, f"data.train_paths=[{corpus}]"])
        with runtime(config) as run:
            from illada_megatron.training.setup import setup
            from illada_megatron.training.trainer import train_step

            state = setup(config, run)
            train_step(state)  # the moments exist from here on
            variants = _variants(state, place)
            found: dict[str, list[Save]] = {name: [] for name in variants}
            for number in range(rounds + 1):
                for name, save in variants.items():
                    result = save(number)
                    shutil.rmtree(place / "now", ignore_errors=True)
                    os.sync()
                    if number:  # the first makes the copies' memory
                        found[name].append(result)
                    console.print(f"{number:2d}  {name:32s} {result.stall:7.3f} s of {result.seconds:7.3f} s")
            nbytes = _state_bytes(state)
            state.loader.close()
    _report(console, found, nbytes)


def _variants(state: Any, place: Path) -> dict[str, Callable[[int], Save]]:
    from illada_megatron.checkpoint.owner import owned
    from illada_megatron.checkpoint.saver import Saver
    from illada_megatron.training.trainer import train_step

    models = [chunk.module for chunk in state.chunks]

    def ours(asynchronous: bool) -> Callable[[int], Save]:
        settings = state.config.checkpoint.model_copy(
            # of its own: the saver that comes last owns a directory
            update={"save_dir": str(place / "now" / f"asynchronous_{asynchronous}"), "asynchronous": asynchronous}
        )
        ownership = ExitStack().enter_context(owned(settings.save_dir, print))  # to the end of this process
        saver = Saver(state.config.model_copy(update={"checkpoint": settings}), {}, None, ownership)

        def save(number: int) -> Save:
            outcomes = saver.save(number, models, state.optimizer, state.progress())
            train_step(state)  # what the run would do next; its optimizer waits for what is not written yet
            outcomes = [*outcomes, *saver.wait()]
            assert outcomes[0].error is None, outcomes[0].error
            return Save(outcomes[0].stall_seconds, outcomes[0].seconds)

        return save

    return {
        "ours": ours(False),
        "ours, while the run goes on": ours(True),
        "megatron-core": _megatron(state, models, place, False),
        "megatron-core, asynchronous": _megatron(state, models, place, True),
    }


def _megatron(state: Any, models: list, place: Path, asynchronous: bool) -> Callable[[int], Save]:
    """Its torch_dist format with the fully reshardable optimizer; it does not flush what it writes, so it is flushed
    here, inside of the time until it is durable."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    from illada_megatron.training.trainer import train_step

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    queue = AsyncCallsQueue()
    # its other way, the default since 0.19, needs a package of NVIDIA's
    ways = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}

    def save(number: int) -> Save:
        path = place / "now" / f"step_{number:08d}"
        path.mkdir(parents=True)
        begin = time.perf_counter()
        weights = models[0].sharded_state_dict(metadata=dict(metadata))
        weights = {key: entry for key, entry in weights.items() if not key.endswith("_extra_state")}
        whole = {"model": weights}
        whole["optimizer"] = state.optimizer.sharded_state_dict(weights, is_loading=False, metadata=dict(metadata))
        request = dist_checkpointing.save(whole, str(path), async_sharded_save=asynchronous, **ways)
        if not asynchronous:
            _flush(path)
            seconds = time.perf_counter() - begin
            train_step(state)
            return Save(seconds, seconds)
        queue.schedule_async_request(request)
        stall = time.perf_counter() - begin
        train_step(state)
        queue.maybe_finalize_async_calls(blocking=True)
        _flush(path)
        return Save(stall, time.perf_counter() - begin)

    return save


def _flush(path: Path) -> None:
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _state_bytes(state: Any) -> int:
    from illada_megatron.checkpoint.sharded import parts_to_save

    models = [chunk.module for chunk in state.chunks]
    return sum(part.tensor.nbytes for part in parts_to_save(models, state.optimizer, state.config.model))


def _report(console: Console, found: dict[str, list[Save]], nbytes: int) -> None:
    table = Table("save", "run waits (s)", "until durable (s)", "GB/s", "waits, of ours at once")
    base = statistics.median(save.seconds for save in found["ours"])
    rows = {}
    for name, saves in found.items():
        stall, seconds = (statistics.median(getattr(save, field) for save in saves) for field in ("stall", "seconds"))
        rows[name] = {"stall_seconds": stall, "seconds": seconds, "of_synchronous": stall / base}
        table.add_row(name, f"{stall:.3f}", f"{seconds:.3f}", f"{nbytes / 1e9 / seconds:.2f}", f"{stall / base:.3f}")
    console.print(table)
    own = rows["ours, while the run goes on"]["of_synchronous"]
    figures = {"benchmark": "save_stall", "bytes": nbytes, "variants": rows, "bar": BAR, "holds": own < BAR}
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)

"""Runs of a small model in emulated FP8 (`benchmarks/fp8`), in a process of its own that prints JSON.

python -m tests.te.emulation_run DIRECTORY
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.fp8 import stand_in

RECIPES = ("tensorwise", "delayed", "blockwise")
LAYERS, STEPS, SAVED = 2, 4, 2
_MODEL = (
    *(f"model.num_layers={LAYERS}", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=250", "data.sequence_length=64", "training.micro_batch_size=1"),
    *("training.global_batch_size=2", f"training.train_steps={STEPS}", "training.lr=1e-3", "schedule.warmup_steps=0"),
    *("faults.watchdog_seconds=null", "runtime.num_threads=1", "checkpoint.asynchronous=false"),
    *("fp8.num_layers_at_start_in_bf16=0", "fp8.num_layers_at_end_in_bf16=0", "logging.interval_steps=1"),
)


def main(place: Path) -> None:
    _install()
    from tests.corpus import write_corpus

    shard = f"data.train_paths=[{write_corpus(place / 'text')}]"
    found: dict[str, Any] = {"bf16": _run(place, "bf16", shard, "training.precision=bf16")}
    for recipe in RECIPES:
        found[recipe] = _run(place, recipe, shard, "training.precision=fp8", f"fp8.recipe={recipe}")
    found["stale"] = _with_stale_weights(place, shard)
    held_out = f"data.validation_paths=[{write_corpus(place / 'held_out')}]"
    validation = (held_out, "validation.interval_steps=1", "validation.num_samples=4")
    found["validated"] = _run(place, "validated", shard, *_precision("delayed"), *validation)
    found["bad step"] = _with_a_bad_step(place, shard)
    found |= _resumed(place, shard)
    found |= _gathered(place, shard)
    print(json.dumps(found))


def tensor_parallel_rank(rank: int, place: str, shard: str) -> None:
    """A rank of a run with delayed scaling, which writes what it has found to `rank_0.json`, ..."""
    _install()
    found = _run(Path(place), "ranks", shard, *_precision("delayed"), "parallel.tensor_model_parallel_size=2")
    (Path(place) / f"rank_{rank}.json").write_text(json.dumps(found))


def _install() -> None:
    stand_in.install()
    from illada_megatron.runtime.megatron import import_megatron

    import_megatron()
    from benchmarks.fp8 import emulation

    emulation.install()


def _run(place: Path, name: str, *overrides: str) -> dict[str, Any]:
    """Of a run: losses, which steps were skipped, matrix products by the formats of their operands, its curves; what
    delayed scaling has kept: factors, and the largest of each tensor's history."""
    from benchmarks.fp8 import emulation, kernels
    from illada_megatron.training import reporter, train, trainer

    kernels.GEMMS.clear()
    curves: dict[str, float] = {}
    layers: list[Any] = []
    log, schedule = place / f"{name}.jsonl", trainer.run_schedule

    def seen(source: Any, chunks: Any, *arguments: Any, **options: Any) -> Any:
        layers[:] = chunks
        return schedule(source, chunks, *arguments, **options)

    config = emulation.emulated_config(None, [*_MODEL, f"logging.jsonl_path={log}", *overrides])
    with (
        _instead(reporter.Reporter, "scalars", lambda _self, _step, values: curves.update(values)),
        _instead(trainer, "run_schedule", seen),
    ):
        train(config)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    found = {name: [step[field] for step in steps] for name, field in (("losses", "loss"), ("skipped", "skipped"))}
    return {**found, "gemms": dict(kernels.GEMMS), "curves": curves, "scaling": _scaling(layers)}


def _scaling(chunks: Any) -> dict[str, list[float]]:
    from illada_megatron.checkpoint.fp8_state import scalings

    found: dict[str, list[float]] = {}
    for one in scalings(chunks, True):
        factors, history = one.names()
        found |= {factors: one.scale.tolist(), history: one.amax_history.amax(0).tolist()}
    return found


@contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _with_stale_weights(place: Path, shard: str) -> dict[str, Any]:
    """What a loop would do that does not tell Transformer Engine of the first micro-batch."""
    from megatron.core.transformer.module import MegatronModule

    called = 0

    def only_once(self: Any) -> None:
        nonlocal called
        called += 1
        for module in self.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = called == 1

    with _instead(MegatronModule, "set_is_first_microbatch", only_once):
        return _run(place, "stale", shard, "training.precision=fp8", "fp8.recipe=tensorwise")


def _with_a_bad_step(place: Path, shard: str) -> dict[str, Any]:
    """A run whose second step meets an infinite weight: whether what delayed scaling has seen is finite behind the
    step's passes, and as before them in the next step. Then its layers load a checkpoint that has none of it."""
    from illada_megatron.checkpoint import fp8_state
    from illada_megatron.config.schema import ModelConfig
    from illada_megatron.training import trainer

    schedule = trainer.run_schedule
    found: dict[str, Any] = {"steps": 0}
    layers: list[Any] = []
    before: list[Tensor] = []

    def state() -> list[Tensor]:
        return [one for scaling in fp8_state.scalings(layers, True) for one in (scaling.scale, scaling.amax_history)]

    def poisoned(source: Any, chunks: Any, *arguments: Any, **options: Any) -> Any:
        found["steps"], layers[:] = found["steps"] + 1, chunks
        weight = chunks[0].module.decoder.layers[0].self_attention.linear_qkv.layer_norm_weight.data
        kept = weight.clone()
        if found["steps"] == 2:
            before.extend(one.clone() for one in state())
            weight.fill_(math.inf)
        elif found["steps"] == 3:
            found["as before"] = len(before) > 0 and all(map(torch.equal, before, state()))
        sums = schedule(source, chunks, *arguments, **options)
        if found["steps"] == 2:
            found["finite"] = all(bool(one.isfinite().all()) for one in state())
        weight.copy_(kept)
        return sums

    with _instead(trainer, "run_schedule", poisoned):
        found |= _run(place, "bad step", shard, *_precision("delayed"))
    nothing: Any = SimpleNamespace(tensors={})
    fp8_state.load(nothing, [chunk.module for chunk in layers], ModelConfig())
    found["begun anew"] = all(bool((one == float(one.dim() == 1)).all()) for one in state())
    return found


def _resumed(place: Path, shard: str) -> dict[str, Any]:
    """Runs that stop after SAVED steps and go on: in the same recipe, in another, and from and to bf16."""
    found: dict[str, Any] = {}
    for first, then in (
        ("delayed", "delayed"),
        ("tensorwise", "tensorwise"),
        ("delayed", "bf16"),
        ("bf16", "delayed"),
        ("delayed", "blockwise"),
    ):
        name = f"{first} -> {then}"
        directory = place / name.replace(" -> ", "_")
        save = (f"checkpoint.save_dir={directory}", f"checkpoint.interval_steps={SAVED}")
        _run(place, f"{name} 1", shard, *_precision(first), *save, f"training.exit_steps={SAVED}")
        found[name] = _run(place, f"{name} 2", shard, *_precision(then), *save)
        if first == "delayed":
            found["tensors"] = _tensors(directory)
    return found


def _gathered(place: Path, shard: str) -> dict[str, Any]:
    """Runs that keep their weights in FP8, saved after SAVED steps and continued; and whether the weights that they
    save are those of runs that keep them in bf16."""
    found: dict[str, Any] = {}
    for recipe in ("tensorwise", "delayed"):
        weights = []
        for gather in (False, True):
            name = f"{recipe}, gathered" if gather else f"{recipe}, kept in bf16"
            directory = place / name.replace(", ", "_").replace(" ", "_")
            options = (*_precision(recipe), f"fp8.param_gather={str(gather).lower()}")
            save = (f"checkpoint.save_dir={directory}", f"checkpoint.interval_steps={SAVED}")
            first = _run(place, f"{name} 1", shard, *options, *save, f"training.exit_steps={SAVED}")
            second = _run(place, f"{name} 2", shard, *options, *save)
            found[name] = first["losses"] + second["losses"]
            weights.append(_weights(directory))
        found[f"{recipe}, largest difference"] = _largest_difference(*weights)
    return found


def _largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of all tensors, relative to a tensor's largest value. They have the same names and types."""
    assert [(name, tensor.dtype) for name, tensor in one.items()] == [(n, t.dtype) for n, t in other.items()]
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-30)) for name in one)


def _weights(directory: Path) -> dict[str, Any]:
    """All tensors of the first checkpoint but FP8's state."""
    from illada_megatron.checkpoint.files.tensors import TensorReader

    reader = TensorReader(directory / f"step_{SAVED:08d}")
    names = sorted(name for name in reader.tensors if not name.startswith("fp8."))
    return {name: reader.read(name) for name in names}


def _precision(name: str) -> list[str]:
    return ["training.precision=bf16"] if name == "bf16" else ["training.precision=fp8", f"fp8.recipe={name}"]


def _tensors(directory: Path) -> dict[str, list[int]]:
    """Shapes of what the first checkpoint holds of FP8."""
    from illada_megatron.checkpoint.files.tensors import TensorReader

    tensors = TensorReader(directory / f"step_{SAVED:08d}").tensors
    return {name: list(info.shape) for name, info in tensors.items() if name.startswith("fp8.")}


if __name__ == "__main__":
    main(Path(sys.argv[1]))

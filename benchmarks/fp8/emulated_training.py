"""Trains the demo's layers (preset tiny) in bf16, in fp32 and in each FP8 recipe from the same start, on a CPU, over
stand-ins for Transformer Engine's kernels; prints a table and draws the losses.

    python -m benchmarks.fp8.emulated_training [--steps 300] [--directory DIR] [--png FILE]

Text: the bytes of this package's Python files, one a token. In FP8 are all linear layers: none is left out at the ends.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

ROOT = Path(__file__).parents[2]
RECIPES = ("bf16", "fp32", "tensorwise", "delayed", "blockwise")
"""fp32 shows how far roundings alone lead apart."""
_MODEL = (
    *("model.num_layers=4", "model.hidden_size=256", "model.ffn_hidden_size=704", "model.num_attention_heads=8"),
    *("model.num_query_groups=2", "model.vocab_size=262", "model.init_method_std=0.05", "model.rotary_base=10000.0"),
    *("data.sequence_length=128", "data.holdout_tokens=65536", "optimizer.adam_beta2=0.98"),
    *("schedule.warmup_steps=40", "schedule.decay_start=0.3", "training.lr=2.0e-3", "training.micro_batch_size=4"),
    *("training.global_batch_size=4", "validation.num_samples=256", "runtime.num_threads=1"),
)


def main(
    steps: Annotated[int, typer.Option()] = 300,
    directory: Annotated[Path | None, typer.Option(help="Where the runs' logs go.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the losses into this file.")] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare emulated FP8 with bf16."""
    if one is not None:
        assert directory is not None
        _train(one, steps, directory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = directory or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        _write_corpus(place / "text")
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.fp8.emulated_training", f"--steps={steps}"]
        processes = [subprocess.Popen([*command, f"--directory={place}", f"--one={one}"]) for one in RECIPES]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"runs ended with {dict(zip(RECIPES, codes, strict=True))}")
        runs = {recipe: [json.loads(line) for line in _log(place, recipe).open()] for recipe in RECIPES}
        gemms = {recipe: json.loads((place / f"{recipe}.gemms.json").read_text()) for recipe in RECIPES}
    print("\n".join(table(runs, gemms)))
    if png is not None:
        draw(runs, png)


def _log(place: Path, recipe: str) -> Path:
    return place / f"{recipe}.jsonl"


def _write_corpus(prefix: Path) -> None:
    from illada_megatron.data.shards.indexed_dataset import IndexedDatasetWriter

    with IndexedDatasetWriter(prefix, 262) as writer:
        for source in sorted((ROOT / "illada_megatron").rglob("*.py")):
            tokens = np.frombuffer(source.read_bytes(), dtype=np.uint8).astype(np.int32) + 6
            if len(tokens):
                writer.add(tokens, np.array([len(tokens)], dtype=np.int64))


def _train(recipe: str, steps: int, place: Path) -> None:
    """In a process of its own, which is told of a GPU."""
    from benchmarks.fp8 import kernels, stand_in

    stand_in.install()
    from illada_megatron.runtime.megatron import import_megatron

    import_megatron()
    from benchmarks.fp8 import emulation
    from illada_megatron.training import train

    emulation.install()
    config = emulation.emulated_config(
        None,
        [
            *_MODEL,
            *precision(recipe),
            *(f"training.train_steps={steps}", f"validation.interval_steps={steps}", f"logging.interval_steps={steps}"),
            *(f"data.train_paths=[{place / 'text'}]", f"logging.jsonl_path={_log(place, recipe)}"),
        ],
    )
    train(config)
    (place / f"{recipe}.gemms.json").write_text(json.dumps(kernels.GEMMS))


def precision(recipe: str) -> list[str]:
    """Overrides: bf16, fp32, or a recipe with all layers in FP8."""
    if recipe in ("bf16", "fp32"):
        return [f"training.precision={recipe}"]
    ends = ["fp8.num_layers_at_start_in_bf16=0", "fp8.num_layers_at_end_in_bf16=0"]
    return ["training.precision=fp8", f"fp8.recipe={recipe}", *ends]


def table(runs: dict[str, list[dict[str, Any]]], gemms: dict[str, dict[str, int]]) -> list[str]:
    """Markdown."""
    rows = [
        "| layers' products | operands | loss, last 50 steps | largest difference of a step | held-out bound |",
        "|---|---|---|---|---|",
    ]
    base = np.array([step["loss"] for step in runs["bf16"]])
    for recipe, steps in runs.items():
        losses = np.array([step["loss"] for step in steps])
        bound = steps[-1]["held_out"][-1]["mean"]["nats_per_token"]
        formats = ", ".join(sorted(gemms[recipe]))
        rows.append(
            f"| {recipe} | {formats} | {losses[-50:].mean():.4f} ({losses[-50:].mean() - base[-50:].mean():+.4f}) | "
            f"{np.abs(losses / base - 1).max():.1%} | {_estimate(bound)} |"
        )
    return rows


def _estimate(bound: Any) -> str:
    if isinstance(bound, dict):
        return f"{bound['value']:.4f} ± {bound['standard_error']:.4f}"
    return f"{bound:.4f}"


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Losses smoothed over 20 steps, and how far each recipe's are from bf16's."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    kernel, width = np.ones(20) / 20, 20
    base = np.convolve([step["loss"] for step in runs["bf16"]], kernel, "valid")
    for recipe, steps in runs.items():
        smooth = np.convolve([step["loss"] for step in steps], kernel, "valid")
        at = np.arange(width, width + len(smooth))
        (line,) = above.plot(at, smooth, label=recipe, linewidth=1)
        if recipe != "bf16":
            below.plot(at, smooth - base, color=line.get_color(), linewidth=1)
    above.set_ylabel("loss (nats/token), mean of 20 steps")
    above.legend()
    below.set_ylabel("minus bf16's")
    below.set_xlabel("step")
    below.axhline(0.0, color="black", linewidth=0.5)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)

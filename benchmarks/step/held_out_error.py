"""How far off the held-out bound is: a few windows against all of them, over seeds. See docs/training.md.

python -m benchmarks.step.held_out_error --checkpoint demo/run/checkpoints"""

import json
import math
from dataclasses import replace
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from illada_megatron.checkpoint.predictor import find_checkpoint, saved_config
from illada_megatron.runtime import runtime

_ONE_RANK = (
    *("parallel.data_parallel_size=null", "parallel.tensor_model_parallel_size=1", "training.micro_batch_size=32"),
    *("parallel.pipeline_model_parallel_size=1", "training.pad_global_batch=true", "training.rampup_batch_size=null"),
)


def main(
    checkpoint: Annotated[str, typer.Option(help="a run's checkpoint.save_dir, or one checkpoint")],
    samples: Annotated[int, typer.Option(help="windows of a figure")] = 64,
    seeds: Annotated[int, typer.Option(min=2, help="figures")] = 12,
    rounds: Annotated[int, typer.Option(help="how often all windows are read for the figure of all")] = 4,
) -> None:
    """The last line of standard output is JSON. It holds where the seeds' figures and that of all windows agree within
    two of their standard errors, as often as normal errors do, and the standard error is no smaller than the spread."""
    console = Console(stderr=True)
    info = find_checkpoint(checkpoint)
    config = saved_config(info, _ONE_RANK)
    with runtime(config) as run:
        from illada_megatron.training.evaluate import build_model_chunks, load_evaluated_weights
        from illada_megatron.training.held_out_figures import Estimate
        from illada_megatron.training.setup import held_out_source
        from illada_megatron.training.validation import evaluate

        models = build_model_chunks(config, run.device)
        load_evaluated_weights(info, config, models, ema=False)
        source = held_out_source(config, run, None, samples)

        def bound(seed: int, num_samples: int) -> Estimate:
            maker = replace(source.samples, seed=seed, num_samples=num_samples)
            found = evaluate(models, replace(source, batches=replace(source.batches, maker=maker)))
            console.print(f"seed {seed}, {num_samples} samples: {found.mean.nats_per_token}")
            return found.mean.nats_per_token

        few = [bound(seed, samples) for seed in range(seeds)]
        windows = source.samples.corpora[0].num_windows
        whole = bound(seeds, rounds * windows)
    values = np.array([one.value for one in few])
    errors = np.array([one.standard_error for one in few], dtype=float)
    off = np.abs(values - whole.value) / np.hypot(errors, whole.standard_error or 0.0)
    spread = float(values.std(ddof=1))
    figures = {
        **{"benchmark": "held_out_error", "checkpoint": str(info.path), "samples": samples, "seeds": seeds},
        **{"windows": windows, "sequence_length": config.data.sequence_length},
        "nats_per_token": values.round(4).tolist(),
        "mean": float(values.mean()),
        "spread_over_seeds": spread,
        "standard_error": math.sqrt(float(np.square(errors).mean())),
        "all_windows": whole.value,
        "all_windows_standard_error": whole.standard_error,
        "off_in_standard_errors": off.round(2).tolist(),
    }
    # the spread of 12 figures is itself off by a fifth
    outside = math.erfc(math.sqrt(2))  # two standard errors, once in 22
    most = round(outside * seeds + 2 * math.sqrt(outside * seeds))
    figures["holds"] = bool((off > 2).sum() <= most and spread < 1.25 * figures["standard_error"])
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)

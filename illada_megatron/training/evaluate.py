"""The held-out bound of a checkpoint, or of the weights a run starts from, outside of a run."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from illada_megatron.checkpoint.predictor import ONE_STAGE_LAYOUT, find_checkpoint, saved_config
from illada_megatron.checkpoint.sharded import load_weights
from illada_megatron.checkpoint.store import CheckpointInfo
from illada_megatron.config import ParallelConfig, RunConfig, load_config
from illada_megatron.data.corpus.configured import check_unseen, corpus_of_run
from illada_megatron.data.corpus.fingerprint import fingerprints, of_tokens
from illada_megatron.data.tokenizers.tokenizer import Tokenizer
from illada_megatron.model import MaskPredictor, build_model_chunks, fill_initial_weights
from illada_megatron.runtime import runtime, world_size_from_environment
from illada_megatron.system.console import made_console
from illada_megatron.training.held_out_figures import HeldOut
from illada_megatron.training.held_out_report import Notes, agree, write_report
from illada_megatron.training.setup import check_fingerprints, checked_tokenizer, held_out_source
from illada_megatron.training.validation import HeldOutSource, Losses, evaluate

_WHAT_IS_HELD_OUT = ("held_out", "corpora")
"""Of a run's fingerprints of its data."""


def layout_of_this_world(wanted: ParallelConfig, overrides: Sequence[str] = ()) -> list[str]:
    """Overrides that fit a configuration to the ranks there are: its own sizes where these divide them, else one stage
    and as much of its tensor parallelism as divides them, the rest data parallel. Stages that `overrides` name, and
    `wanted` has, stay. The global batch, which nobody trains on, divides nothing."""
    ranks, stages = world_size_from_environment(), wanted.pipeline_model_parallel_size
    sizes = wanted.tensor_model_parallel_size * wanted.context_parallel_size * stages
    batch = ["training.pad_global_batch=true", "training.rampup_batch_size=null", "parallel.data_parallel_size=null"]
    batch.append("parallel.tp_comm_overlap=false")  # of training's machines; there may be no Transformer Engine here
    if ranks % sizes == 0:
        return batch
    asked = any(one.startswith("parallel.pipeline_model_parallel_size=") for one in overrides)
    tensor = math.gcd(wanted.tensor_model_parallel_size, max(1, ranks // stages) if asked else ranks)
    return [*batch, *ONE_STAGE_LAYOUT, f"parallel.tensor_model_parallel_size={tensor}"]


@dataclass(frozen=True)
class Evaluation:
    """What `illada evaluate` has to say."""

    held_out: HeldOut
    notes: list[str]
    """How it came about."""


def evaluate_checkpoint(
    config: str | None,
    overrides: Sequence[str],
    checkpoint: str | None,
    json_path: Path | None = None,
    ema: bool = False,
) -> Evaluation | None:
    """Evaluate the newest checkpoint below `checkpoint`, with the configuration it was saved with, or, without one, the
    initial weights of `config` (a path or a preset). ema: the moving average of a checkpoint's weights.
    Every rank calls it; only rank 0 gets the figures.

    json_path: written with all figures; an evaluation that was interrupted goes on where it stopped.

    Raises ConfigError, CheckpointError, DataError, or OSError where json_path cannot be written.
    """
    info = find_checkpoint(checkpoint) if checkpoint is not None else None
    if info is None:
        resolved = load_config(config, overrides)
    else:
        resolved = saved_config(
            info, [*layout_of_this_world(saved_config(info, overrides).parallel, overrides), *overrides]
        )
    with runtime(resolved) as run:
        tokenizer = checked_tokenizer(resolved)
        said = _check_held_out(info, resolved, tokenizer)
        source = held_out_source(resolved, run, tokenizer, resolved.validation.evaluate_samples)
        models = build_model_chunks(resolved, run.device)
        weights = load_evaluated_weights(info, resolved, models, ema)
        of = {**weights, **_samples_record(source, resolved, tokenizer)}
        notes = Notes(json_path, of) if json_path is not None and run.is_main else None
        losses = Losses.none_yet(source.samples)
        if notes is not None:
            said += notes.read(losses)
            notes.write(losses)  # where it cannot be, better now than in an hour
        agree(losses, run.device.torch_device)
        with _bar(len(source.samples), losses.done, shown=run.is_main) as progress:

            def after_round(losses: Losses) -> None:
                progress(losses)
                if notes is not None:
                    notes.write(losses)

            held_out = evaluate(models, source, losses, after_round)
        if notes is not None and json_path is not None:
            write_report(json_path, of, held_out, source, losses)
            notes.remove()
        return Evaluation(held_out, said) if run.is_main else None


def _check_held_out(info: CheckpointInfo | None, config: RunConfig, tokenizer: Tokenizer | None) -> list[str]:
    """What is evaluated must not have been trained on. Returns what there is to be said; raises CheckpointError,
    DataError."""
    if config.data.validation_paths:
        return check_unseen(config.data)
    if info is None or info.progress is None:
        return []
    now = fingerprints(corpus_of_run(config, tokenizer), tokenizer)
    # the order in which the rest came says nothing of what was held out
    before, after = (
        {"data": {key: one.get("data", {}).get(key) for key in _WHAT_IS_HELD_OUT}} for one in (info.fingerprints, now)
    )
    return check_fingerprints(info, before, after, config.checkpoint.allow_mismatch)


def load_evaluated_weights(
    info: CheckpointInfo | None, config: RunConfig, models: Sequence[MaskPredictor], ema: bool
) -> dict[str, Any]:
    """Fill the models with the weights that are to be evaluated: a checkpoint's, their moving average, or (None)
    initial ones. Which ones they are is chosen here and nowhere else. Returns what tells them from others."""
    if info is None:
        seed = config.training.seeds.init
        fill_initial_weights(models, config.model, seed)
        return {"checkpoint": None, "step": 0, "weights": f"initial, seed {seed}"}
    load_weights(info, config, models, ema)
    digest = xxhash.xxh3_128_hexdigest(json.dumps(info.files, sort_keys=True).encode())
    return {"checkpoint": str(info.path), "step": info.step, "ema": ema, "weights": digest}


@contextmanager
def _bar(num_samples: int, done: int, shown: bool) -> Iterator[Callable[[Losses], None]]:
    """Of the samples that are done; on stderr, of one rank."""
    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=made_console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("evaluate", total=num_samples, completed=done)
        yield lambda losses: bar.update(task, completed=losses.done)


def _samples_record(source: HeldOutSource, config: RunConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What tells these samples, and what is computed of them, from others."""
    samples = source.samples
    return {
        "model": config.model.model_dump(mode="json"),
        "precision": config.training.precision,
        "seed": samples.seed,
        "num_samples": samples.num_samples,
        "sequence_length": samples.sequence_length,
        "texts": {corpus.name: of_tokens(corpus) for corpus in samples.corpora},
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
    }

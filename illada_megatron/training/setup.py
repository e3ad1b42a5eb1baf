"""Everything a run is made of, built in order: model, optimizer, corpora, and where it goes on."""

import json
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer

from illada_megatron.checkpoint.files.agreement import gathered, rank_and_size
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.sharded import load_checkpoint
from illada_megatron.checkpoint.store import CheckpointInfo, checkpoint_to_continue
from illada_megatron.config import ConfigError, RunConfig
from illada_megatron.data.corpus.configured import corpus_of_run, epoch_problems, held_out_corpora
from illada_megatron.data.corpus.fingerprint import differences, fingerprints
from illada_megatron.data.corpus.prefetch import Prefetcher
from illada_megatron.data.corpus.text_bytes import token_bytes
from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.finding import find_tokenizer
from illada_megatron.data.tokenizers.fitting import check_mask, unused_rows
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, forget_tokenizers, load_tokenizer
from illada_megatron.diffusion.held_out import HeldOutSamples
from illada_megatron.model import build_model_chunks, fill_initial_weights
from illada_megatron.runtime import Runtime
from illada_megatron.training.bad_steps import BadSteps
from illada_megatron.training.division import Division
from illada_megatron.training.ema import WeightEma
from illada_megatron.training.forward_step import BatchSlice, BatchSource, Microbatch, TrainingSamples
from illada_megatron.training.gradient_reduction import wrap_data_parallel
from illada_megatron.training.optimizer import build_optimizer
from illada_megatron.training.resume import Change, change_lines, changes_since, where_it_stands
from illada_megatron.training.schedule import LearningRate, next_batch, samples_of_run
from illada_megatron.training.spikes import SpikeDetector
from illada_megatron.training.stragglers import ComputeClock
from illada_megatron.training.validation import HeldOutSource


@dataclass
class TrainingState:
    """A run in the middle of it. What changes: the weights, the optimizer, the schedule and the two counters."""

    config: RunConfig
    runtime: Runtime
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: LearningRate
    source: BatchSource[TrainingSamples]
    validation: HeldOutSource | None
    fingerprints: dict[str, Any]
    """Of what the run reads."""
    ema: WeightEma | None
    """Of the weights; None: not kept (optimizer.ema_decay)."""
    bad_steps: BadSteps
    spikes: SpikeDetector
    clock: ComputeClock
    step: int = 0
    """Steps done."""
    consumed_samples: int = 0
    held_out: dict[str, float] | None = None
    """The last validation: its step, the bound in nats/token and the tokens it is over."""
    saved_step: int | None = None
    """The step of the checkpoint of save_dir that the run continues from."""
    notes: list[str] = field(default_factory=list)
    """What setup has to tell the user."""
    changes: list[Change] = field(default_factory=list)
    """Of the configuration, since the checkpoint that the run continues from."""

    loader: Prefetcher[BatchSlice, Microbatch] = field(init=False)
    """The micro-batches from `step` on."""

    def close(self) -> None:
        """End what works ahead."""
        self.loader.close()

    def progress(self) -> dict[str, Any]:
        """The part of a checkpoint that is not tensors."""
        average = {} if self.ema is None else {"ema": self.ema.state_dict()}
        return {
            **average,
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "schedule": self.schedule.state_dict(),
            "bad_steps": self.bad_steps.state_dict(),
            "spikes": self.spikes.state_dict(),
            **({} if self.held_out is None else {"held_out": self.held_out}),
        }


def setup(config: RunConfig, runtime: Runtime) -> TrainingState:
    """Build the run and restore the checkpoint it continues from, if there is one.

    Raises ConfigError, CheckpointError or the data package's error, naming what does not fit.
    """
    tokenizer, seeds = checked_tokenizer(config), config.training.seeds
    corpus = corpus_of_run(config, tokenizer)
    samples = TrainingSamples(corpus, config, seeds.noise)
    division = Division(samples.work, config.model, runtime.layout, config.training.micro_batch_size)
    source = BatchSource(samples, config, runtime, division)
    models = build_model_chunks(config, runtime.device)
    checkpoint, refused = checkpoint_to_continue(config.checkpoint)
    if checkpoint is None:
        fill_initial_weights(models, config.model, seeds.init)
    chunks = wrap_data_parallel(config.parallel, models)
    optimizer, decay = build_optimizer(config, chunks), config.optimizer.ema_decay
    state = TrainingState(
        config=config,
        runtime=runtime,
        chunks=chunks,
        optimizer=optimizer,
        schedule=LearningRate(config),
        source=source,
        validation=held_out_source(config, runtime, tokenizer, config.validation.num_samples)
        if config.validation.interval_steps
        else None,
        fingerprints=fingerprints(corpus, tokenizer),
        ema=None if decay is None else WeightEma(decay, chunks, optimizer, config.model),
        bad_steps=BadSteps(config.faults),
        spikes=SpikeDetector(config.faults),
        clock=ComputeClock(runtime.device.is_cuda),
    )
    if tokenizer is not None:
        unused = unused_rows(tokenizer, config.data.tokenizer_path or "", config.model.vocab_size)
        state.notes += [f"warning: {unused}"] if unused else []
    forget_tokenizers()  # by now it is compared with all that it has to fit
    models[0].config.timers = state.clock
    state.notes += [f"warning: {line} (allowed)" for line in corpus.warnings]
    state.notes += [f"refused {reason}" for reason in refused]
    if checkpoint is not None:
        restore(state, checkpoint)
    state.schedule.begin(state.step, state.consumed_samples)
    _check_epochs(state)
    state.loader = source.prefetch(slices(state))
    return state


def held_out_source(
    config: RunConfig, runtime: Runtime, tokenizer: Tokenizer | None, num_samples: int
) -> HeldOutSource:
    """`num_samples` samples of each held-out text."""
    seed, allowed = config.validation.seed, config.checkpoint.allow_mismatch
    corpora = held_out_corpora(config.data, seed, config.model.vocab_size, tokenizer, allowed)
    samples = HeldOutSamples(corpora, num_samples, seed, config.model.mask_token_id)
    return HeldOutSource(BatchSource(samples, config, runtime), token_bytes(tokenizer))


def count_held_parameters(chunks: Sequence[torch.nn.Module]) -> int:
    """Parameters on this rank."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def restore(state: TrainingState, checkpoint: CheckpointInfo) -> None:
    """Go on where a checkpoint was saved, or begin with its weights where no run of this program has trained them."""
    if checkpoint.progress is not None:
        allowed = state.config.checkpoint.allow_mismatch
        state.notes += check_fingerprints(checkpoint, checkpoint.fingerprints, state.fingerprints, allowed)
    progress = load_checkpoint(checkpoint, state.config, state.chunks, state.optimizer)
    if progress is None:
        state.notes.append(f"begins with the weights of {checkpoint.path}")
        if state.ema is not None:
            state.ema.load_state_dict({})
        return
    state.step, state.consumed_samples = progress["step"], progress["consumed_samples"]
    state.schedule.load_state_dict(progress["schedule"])
    state.bad_steps.load_state_dict(progress.get("bad_steps", {}))
    state.spikes.load_state_dict(progress.get("spikes", {}))
    if state.ema is not None:
        state.ema.load_state_dict(progress.get("ema", {}))
        if "ema" not in progress:
            state.notes.append(
                f"the moving average of the weights begins at those of {checkpoint.path}, which has none"
            )
    elif "ema" in progress:
        state.notes.append(f"the moving average of {checkpoint.path} is left behind: optimizer.ema_decay is not set")
    state.held_out = progress.get("held_out")
    save_dir = state.config.checkpoint.save_dir
    in_place = bool(save_dir) and str(folder(save_dir or "")) == str(checkpoint.path.parent)
    state.saved_step = state.step if in_place else None
    standing = where_it_stands(state.config.training, checkpoint.path, state.step, state.consumed_samples)
    state.changes = changes_since(checkpoint.config, state.config)
    state.notes += [standing, *change_lines(state.changes, checkpoint.path)]


def check_fingerprints(
    checkpoint: CheckpointInfo, saved: dict[str, Any], now: dict[str, Any], allowed: Collection[str]
) -> list[str]:
    """Other tokens under the same sample indices would be trained on without a word, and trained ones be held out.
    Returns what differs and is allowed; raises CheckpointError."""
    lines = [
        f"{line} (older versions held out the last tokens of each corpus)"
        if line.startswith("data.held_out was None")
        else line
        for line in differences(saved, now)
    ]
    if refused := [line for line in lines if _kind(line) not in allowed]:
        kinds = sorted({_kind(line) for line in refused})
        raise CheckpointError(
            f"{checkpoint.path}: the run that saved it read something else:\n  "
            + "\n  ".join(refused)
            + f"\n  correct the configuration, or set checkpoint.allow_mismatch={json.dumps(kinds)} where that is meant"
        )
    return [f"warning: {checkpoint.path}: {line} (allowed)" for line in lines]


def _kind(difference: str) -> str:
    """ "tokenizer" or "data"."""
    return difference.split(".")[0].split()[0]


def checked_tokenizer(config: RunConfig) -> Tokenizer | None:
    """A model that masks with a word, or lacks ids, would train without complaint."""
    if config.data.tokenizer_path is None:
        return None
    tokenizer, model = _found_by_one_a_machine(config.data.tokenizer_path), config.model
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{config.data.tokenizer_path} has {tokenizer.vocab_size} tokens, model.vocab_size is {model.vocab_size}: "
            "raise model.vocab_size"
        )
    if tokenizer.mask_id is not None and tokenizer.mask_id != model.mask_token_id:
        raise ConfigError(
            f"{config.data.tokenizer_path} reserves id {tokenizer.mask_id} for the mask, model.mask_token_id is "
            f"{model.mask_token_id}: set model.mask_token_id={tokenizer.mask_id}"
        )
    check_mask(tokenizer, config.data.tokenizer_path, model.mask_token_id)
    return tokenizer


def _found_by_one_a_machine(name: str) -> Tokenizer:
    """All ranks call it. One rank of each machine looks first: of a tokenizer on the Hugging Face hub the others find
    what it has put into the cache, and a thousand ranks do not ask a server that counts questions.

    Raises DataError, on all ranks."""
    machines = gathered(socket.gethostname())  # srun may give every rank LOCAL_RANK 0
    rank, _ = rank_and_size()
    problem = None
    if machines.index(machines[rank]) == rank:
        try:
            find_tokenizer(name)
        except (DataError, OSError) as error:
            problem = str(error)
    # one that fails ends all: the others would ask again, and who succeeds would wait for those who did not
    if (found := next(filter(None, gathered(problem)), None)) is not None:
        raise DataError(found)
    return load_tokenizer(name)


def _check_epochs(state: TrainingState) -> None:
    """Before anything is trained: the order is known to its end, so is what it repeats."""
    config = state.config
    samples = samples_of_run(config.training, state.step, state.consumed_samples, state.bad_steps.skipped_samples)
    problems = epoch_problems(state.source.maker.corpus, config.data, samples)
    if problems and config.data.epoch_limit == "error":
        raise ConfigError(
            "; ".join(problems) + ": lower training.train_steps or the corpus's weight, raise max_epochs, or set "
            "data.epoch_limit=warn"
        )
    state.notes += [f"warning: {problem}" for problem in problems]


def slices(state: TrainingState) -> Iterator[BatchSlice]:
    """All micro-batches from where the run is, without end: the loop knows when to stop."""
    config, consumed_samples = state.config, state.consumed_samples
    skipped = tuple(state.bad_steps.skipped_samples)
    layout, micro_batch_size = state.runtime.layout, config.training.micro_batch_size
    while True:
        first, size = next_batch(config.training, consumed_samples, skipped)
        for microbatch in range(layout.microbatches(size, micro_batch_size)):
            yield BatchSlice(first, size, microbatch)
        consumed_samples = first + size

"""`train` reads top to bottom: setup -> loop -> evaluate -> save -> finish."""

import math
import time
from dataclasses import dataclass

from illada_megatron.checkpoint.errors import CheckpointError
from illada_megatron.checkpoint.saver import Saver
from illada_megatron.checkpoint.storage import folder
from illada_megatron.config import RunConfig
from illada_megatron.config.load import to_yaml
from illada_megatron.runtime import runtime
from illada_megatron.training.flops import training_flops
from illada_megatron.training.metrics import StepSums, reduce_sums
from illada_megatron.training.optimizer import set_learning_rate
from illada_megatron.training.reporter import Reporter, StepRecord
from illada_megatron.training.schedule import global_batch_size
from illada_megatron.training.setup import TrainingState, setup
from illada_megatron.training.signals import StopSignals
from illada_megatron.training.start_table import start_table
from illada_megatron.training.validation import evaluate, run_schedule, speaks_for_tensor_group


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    consumed_samples: int
    stopped_by: str | None
    """The signal that ended it early; None: it reached its last step."""


def train(config: RunConfig) -> TrainResult:
    """Train until training.exit_steps (or train_steps), or until SIGTERM or SIGINT, which save first.

    Every rank calls it, under torchrun or alone. Raises ConfigError, CheckpointError or the data package's error.
    """
    with runtime(config) as run:
        state = setup(config, run)
        last_step = min(config.training.exit_steps or config.training.train_steps, config.training.train_steps)
        with (
            state.loader,
            Reporter(config, run.is_main, state.step, last_step) as reporter,
            StopSignals() as signals,
            Saver(config, state.fingerprints, state.saved_step) as saver,
        ):
            _announce(state, reporter)
            stop = state.step >= last_step
            while not stop:
                record, stop = train_step(state, stop_requested=signals.received is not None)
                reporter.step(record)
                stop |= state.step >= last_step
                if _due(config.validation.interval_steps, state.step) and state.validation is not None:
                    reporter.held_out(state.step, evaluate(config, run, state.chunks, state.validation))
                if _due(config.checkpoint.interval_steps, state.step):
                    save(state, saver, reporter)
                reporter.saves(saver.news())
            save_last(state, saver, reporter)
            if state.step < last_step:
                reporter.say(f"stopped by {signals.received or 'a signal to another rank'} after step {state.step}")
            return TrainResult(state.step, state.consumed_samples, signals.received if state.step < last_step else None)


def train_step(state: TrainingState, stop_requested: bool = False) -> tuple[StepRecord, bool]:
    """One optimizer step over one global batch. Returns its record and whether any rank asked to stop."""
    config, run = state.config, state.runtime
    start = time.perf_counter()
    batch_size = global_batch_size(config, state.consumed_samples)
    lr = state.schedule.at(state.step)
    set_learning_rate(state.optimizer, lr, config.optimizer.weight_decay)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    local = run_schedule(
        config,
        run,
        list(state.chunks),
        state.loader,
        batch_size // (config.training.micro_batch_size * run.layout.data),
        forward_only=False,
    )
    _, grad_norm, _ = state.optimizer.step()
    sums = reduce_sums(local, speaks_for_tensor_group(), stop_requested, run.device.torch_device)
    state.step += 1
    state.consumed_samples += batch_size
    record = _record(state, sums, batch_size, float(grad_norm or 0.0), lr, time.perf_counter() - start)
    if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
        # a finite loss with such a gradient has just ruined the weights
        raise FloatingPointError(
            f"step {state.step}: the loss is {record.loss}, the gradient norm {record.grad_norm} (samples "
            f"{state.consumed_samples - batch_size} to {state.consumed_samples - 1}); the last checkpoint is "
            "untouched: continue from it, with a lower training.lr if it happens again"
        )
    state.schedule.observe(state.step - 1, record.loss)
    return record, sums.stop


def _record(
    state: TrainingState, sums: StepSums, batch_size: int, grad_norm: float, lr: float, seconds: float
) -> StepRecord:
    config, run = state.config, state.runtime
    tokens = batch_size * config.data.sequence_length
    flops = training_flops(config.model, tokens, sums.squared_lengths, sums.masked)
    tflops = flops / seconds / run.world_size / 1e12
    peak = run.device.peak_tflops
    return StepRecord(
        step=state.step,
        loss=sums.weighted / tokens,
        masked_cross_entropy=sums.masked_cross_entropy,
        cross_entropy_by_t=sums.cross_entropy_by_t(),
        grad_norm=grad_norm,
        lr=lr,
        tokens_per_second=tokens / seconds,
        tflops=tflops,
        mfu=None if peak is None else tflops / peak,
        consumed_samples=state.consumed_samples,
        consumed_tokens=state.consumed_samples * config.data.sequence_length,
        epochs=state.source.corpus.epochs(state.consumed_samples),
        seconds=seconds,
        data_wait_seconds=state.loader.take_wait_seconds(),
    )


def _announce(state: TrainingState, reporter: Reporter) -> None:
    config, run = state.config, state.runtime
    reporter.table("illada-megatron", start_table(state))
    for note in state.notes:
        reporter.say(note)
    if run.is_main and config.checkpoint.save_dir:
        place = folder(config.checkpoint.save_dir)
        place.make()
        place.replace("config.yaml", to_yaml(config).encode())


def _due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def save(state: TrainingState, saver: Saver, reporter: Reporter) -> None:
    """Begin to save the state as it is now, where the configuration wants checkpoints."""
    models = [chunk.module for chunk in state.chunks]
    reporter.saves(saver.save(state.step, models, state.optimizer, state.progress()))


def save_last(state: TrainingState, saver: Saver, reporter: Reporter) -> None:
    """Before the run ends: its last state is in a checkpoint, or the run says that it is not.

    Raises CheckpointError where it cannot be saved.
    """
    reporter.saves(saver.wait())
    if saver.place is None or saver.last_saved == state.step:
        return
    save(state, saver, reporter)
    outcomes = saver.wait()
    reporter.saves(outcomes)
    if saver.last_saved != state.step:
        raise CheckpointError(
            f"step {state.step}: the run's last state could not be saved in {saver.place}: {outcomes[-1].error}; the "
            f"last good checkpoint there is of step {saver.last_saved}: mend the cause and start the run again, it "
            "goes on from there"
        )

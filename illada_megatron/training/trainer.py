"""`train` reads top to bottom: setup -> loop -> evaluate -> save -> finish."""

import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.owner import owned
from illada_megatron.checkpoint.saver import Saver
from illada_megatron.config import RunConfig
from illada_megatron.config.load import to_yaml
from illada_megatron.runtime import rank_from_environment, runtime
from illada_megatron.runtime.spans import span
from illada_megatron.runtime.tables import tell
from illada_megatron.training.bad_steps import BadStep
from illada_megatron.training.flops import training_flops
from illada_megatron.training.fp8_figures import fp8_figures
from illada_megatron.training.fp8_history import ScalingBefore
from illada_megatron.training.metrics import StepSums, reduce_sums
from illada_megatron.training.optimizer import apply_gradients, gradient_norm, set_learning_rate
from illada_megatron.training.profiling import Profiler
from illada_megatron.training.reporter import Reporter, StepRecord
from illada_megatron.training.resume import last_step as last_step_of
from illada_megatron.training.rollback import bad_samples, recover
from illada_megatron.training.run_places import free_places, write_start
from illada_megatron.training.schedule import next_batch
from illada_megatron.training.setup import TrainingState, setup
from illada_megatron.training.signals import StopSignals
from illada_megatron.training.spikes import Spike
from illada_megatron.training.start_table import start_table
from illada_megatron.training.validation import evaluate, run_schedule, speaks_for_tensor_group
from illada_megatron.training.watchdog import Watchdog

# An error that passes at once costs no restart.
_LAST_TRIES = 2


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    consumed_samples: int
    stopped_by: str | None
    """The signal that ended it early; None: it reached its last step."""


def train(config: RunConfig) -> TrainResult:
    """Train until training.exit_steps (or train_steps), or until SIGTERM, SIGINT or SIGUSR1, which save first.

    Every rank calls it, under torchrun or alone. Raises ConfigError, CheckpointError or the data package's error, and
    FloatingPointError where too many steps in a row were bad (faults.max_bad_steps).
    """
    save_seconds = 60 * config.checkpoint.save_timeout_minutes
    traces = None if config.run_dir is None else Path(config.run_dir) / "traces"
    with (
        Watchdog(config.faults.watchdog_seconds, rank_from_environment(), save_seconds, traces) as watchdog,
        runtime(config) as run,
        owned(config.checkpoint.save_dir, tell) as ownership,
        free_places(config),
    ):
        state = setup(config, run)
        last_step = last_step_of(config.training)
        with (
            closing(state),
            Reporter(config, run.is_main, state.step, last_step, state.saved_step is not None) as reporter,
            StopSignals() as signals,
            Saver(config, state.fingerprints, state.saved_step, ownership) as saver,
            Profiler(config.training.profile, run, traces) as profiler,
            watchdog.last_phase("end"),
        ):
            _announce(state, reporter)
            if saver.warning is not None:
                reporter.say(f"warning: {saver.warning}")
            first_step, save_due, stop = state.step, False, state.step >= last_step
            while not stop:
                watchdog.now("step" if state.step > first_step else "first step", state.step + 1)
                profiler.begins(state.step + 1)
                record, stop = train_step(state, stop_requested=signals.received is not None or saver.end is not None)
                reporter.step(record)
                if (note := profiler.ended(state.step)) is not None:
                    tell(note)
                if _due(config.logging.interval_steps, state.step):
                    reporter.compute_times(state.step, state.clock.gather(run))
                    reporter.scalars(state.step, fp8_figures(state.chunks, config, run.device.torch_device))
                if state.bad_steps.too_many:
                    watchdog.now("rollback", state.step)
                    reporter.saves(saver.wait())
                    watchdog.now("rollback", state.step)  # the checkpoint is loaded
                    reporter.rolled_back(recover(state))
                    # where the run is now is saved already, and measured
                    first_step, save_due = state.step, False
                    saver.went_back(state.step, in_place=state.saved_step == state.step)
                    continue
                stop |= state.step >= last_step
                if _due(config.validation.interval_steps, state.step) and state.validation is not None:
                    watchdog.now("validation", state.step)
                    before = ScalingBefore(state.chunks, config)
                    figures = evaluate(state.chunks, state.validation)
                    state.held_out = figures.noted(state.step)
                    reporter.held_out(state.step, figures)
                    if state.ema is not None:
                        saver.secure()
                        with state.ema.as_weights():
                            figures = evaluate(state.chunks, state.validation)
                        reporter.held_out(state.step, figures, ema=True)
                    before.restore()
                # In a row of bad steps the weights may be what is bad: the checkpoint before it stays the newest.
                save_due |= _due(config.checkpoint.interval_steps, state.step)
                if save_due and not state.bad_steps.streak:
                    watchdog.now("saving", state.step)
                    save(state, saver, reporter)
                    save_due = False
                reporter.saves(saver.news())
            save_last(state, saver, reporter, watchdog, complete=state.step >= last_step)
            if state.step < last_step:
                reporter.say(f"stopped by {signals.received or 'a signal to another rank'} after step {state.step}")
            return TrainResult(state.step, state.consumed_samples, signals.received if state.step < last_step else None)


def train_step(state: TrainingState, stop_requested: bool = False) -> tuple[StepRecord, bool]:
    """One optimizer step over one global batch. Returns its record and whether any rank asked to stop.

    Where the loss or the gradient norm is not finite, all ranks leave weights and optimizer as they are: they decide by
    sums over all ranks, before anything is changed.
    """
    config, run = state.config, state.runtime
    start = time.perf_counter()
    first_sample, batch_size = next_batch(config.training, state.consumed_samples, state.bad_steps.skipped_samples)
    lr = state.schedule.at(state.step, first_sample)
    set_learning_rate(state.optimizer, lr, config.optimizer.weight_decay)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    before = ScalingBefore(state.chunks, config)
    state.clock.begin_step()
    with span("forward and backward passes"):
        local = run_schedule(state.source, list(state.chunks), state.loader, batch_size, forward_only=False)
    state.clock.end_step()
    with span("gradient norm"):
        norm = gradient_norm(state.optimizer)
    with span("sums of the step"):
        sums = reduce_sums(
            local,
            speaks_for_tensor_group(),
            run.device.torch_device,
            stop=stop_requested,
            bad_gradient=not math.isfinite(norm),
            context=run.layout.context,
        )
    tokens = batch_size * config.data.sequence_length
    loss = sums.weighted / tokens
    good = math.isfinite(loss) and not sums.bad_gradient
    if good:
        with span("optimizer"):
            apply_gradients(state.optimizer, norm, config.optimizer.clip_grad)
        if state.ema is not None:
            with span("moving average of the weights"):
                state.ema.update()
    else:
        before.restore()
    state.step += 1
    state.consumed_samples = first_sample + batch_size
    seconds = time.perf_counter() - start
    spike = plateau = None
    if good:
        state.bad_steps.observe(None)
        plateau = state.schedule.observe(state.step - 1, first_sample, loss)
        spike = _spike(state, loss, first_sample, batch_size)
    else:
        state.bad_steps.observe(BadStep(state.step, first_sample, state.consumed_samples, loss, norm))
    record = StepRecord(
        step=state.step,
        loss=loss,
        bound=sums.bound / tokens if config.diffusion.sees_all_t else None,
        masked_cross_entropy=sums.masked_cross_entropy,
        cross_entropy_by_t=sums.cross_entropy_by_t(),
        grad_norm=norm,
        lr=lr,
        first_sample=first_sample,
        consumed_samples=state.consumed_samples,
        consumed_tokens=state.consumed_samples * config.data.sequence_length,
        epochs=state.source.maker.corpus.epochs(state.consumed_samples),
        **_speed(state, sums, batch_size, seconds),
        skipped=not good,
        skipped_steps=state.bad_steps.count,
        bad_samples=[] if good else bad_samples(state, local, first_sample, batch_size),
        spike=spike,
        plateau=plateau,
    )
    return record, sums.stop


def _spike(state: TrainingState, loss: float, first_sample: int, batch_size: int) -> Spike | None:
    found = state.spikes.observe(loss)
    if found is None:
        return None
    times = state.source.maker.times(first_sample, batch_size)
    return Spike(loss, *found, first_sample, first_sample + batch_size, times)


def _speed(state: TrainingState, sums: StepSums, batch_size: int, seconds: float) -> dict[str, Any]:
    config, run = state.config, state.runtime
    tokens = batch_size * config.data.sequence_length
    flops = training_flops(config.model, tokens, sums.squared_lengths, sums.masked)
    tflops = flops / seconds / run.world_size / 1e12
    peak = run.device.peak_tflops
    return {
        "tokens_per_second": tokens / seconds,
        "tflops": tflops,
        "mfu": None if peak is None else tflops / peak,
        "seconds": seconds,
        "data_wait_seconds": state.loader.take_wait_seconds(),
    }


def _announce(state: TrainingState, reporter: Reporter) -> None:
    config, run = state.config, state.runtime
    reporter.table("illada-megatron", start_table(state))
    for note in state.notes:
        reporter.say(note)
    if run.is_main and state.step < last_step_of(config.training):
        reporter.begins(state.changes)
        try:
            write_start(config, run.world_size)
        except OSError as error:
            reporter.say(f"warning: run_dir {config.run_dir}: the configuration could not be written: {error}")
    if run.is_main and config.checkpoint.save_dir:
        place = folder(config.checkpoint.save_dir)
        place.make()
        try:
            place.replace("config.yaml", to_yaml(config).encode())
        except OSError as error:  # for people to read; checkpoints have it too
            reporter.say(f"warning: {place}/config.yaml could not be written: {error}; what is there is older")


def _due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def save(state: TrainingState, saver: Saver, reporter: Reporter) -> None:
    """Begin to save the state as it is now, where the configuration wants checkpoints."""
    models = [chunk.module for chunk in state.chunks]
    reporter.save_begins()
    reporter.saves(saver.save(state.step, models, state.optimizer, state.progress()))


def save_last(state: TrainingState, saver: Saver, reporter: Reporter, watchdog: Watchdog, complete: bool) -> None:
    """Before the run ends: its last state is in a checkpoint, or the run says that it is not. complete: there are no
    steps left to do.

    Raises OSError where it cannot be saved: a launcher that starts the run again lets it try again; CheckpointError
    where another run has taken save_dir over.
    """
    watchdog.now("saving", state.step)
    reporter.saves(saver.wait())
    for _ in range(_LAST_TRIES):
        # too many failed saves end the run, but what has been trained since may still be saved
        if saver.place is None or saver.taken_over or state.step in (saver.last_saved, saver.record_left):
            break
        watchdog.now("saving", state.step)  # each has a limit of its own
        save(state, saver, reporter)
        reporter.saves(saver.wait())
    if saver.end is not None and (saver.taken_over or saver.last_saved != state.step):
        raise saver.end
    if saver.end is not None and not complete:
        raise OSError(
            f"too many saves in a row had failed (checkpoint.max_failed_saves) before this one; {saver.last_good()}: "
            "start the run again, it goes on from there"
        )
    if saver.place is not None and saver.last_saved != state.step:
        raise OSError(
            f"step {state.step}: the run's last state could not be saved in {saver.place}: {saver.last_error}; "
            f"{saver.last_good()}: mend the cause and start the run again, it goes on from there"
        )

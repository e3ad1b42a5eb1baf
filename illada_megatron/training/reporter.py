"""What the user sees of a run: tables and lines in the terminal, scalars in TensorBoard, one JSON object a step."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import psutil

from illada_megatron.checkpoint.saver import SaveOutcome
from illada_megatron.config import RunConfig
from illada_megatron.runtime.tables import two_columns
from illada_megatron.training.bad_steps import Rollback
from illada_megatron.training.boards import Boards
from illada_megatron.training.held_out_figures import HeldOut
from illada_megatron.training.held_out_report import as_record, scalars, summary
from illada_megatron.training.logs import StepLog, Terminal
from illada_megatron.training.plateau import Plateau
from illada_megatron.training.resume import Change
from illada_megatron.training.spikes import Spike
from illada_megatron.training.stragglers import ComputeTimes


@dataclass(frozen=True)
class StepRecord:
    """One training step, at full precision."""

    step: int
    """Steps done, this one included."""
    loss: float
    """nats/token: the objective, sum(CE / p) / tokens unless `diffusion.loss_weight` has another weight."""
    bound: float | None
    """nats/token: sum(CE / p) / tokens whatever the objective; None: of the range of t that was drawn from there is
    none."""
    masked_cross_entropy: float
    """nats per masked token."""
    cross_entropy_by_t: list[float | None]
    grad_norm: float
    lr: float
    tokens_per_second: float
    tflops: float
    """Achieved TFLOP/s of a device."""
    mfu: float | None
    first_sample: int
    """The step took the samples [first_sample, consumed_samples)."""
    consumed_samples: int
    consumed_tokens: int
    epochs: dict[str, float]
    """How often each corpus of the blend was read, by its name; "" where there is one."""
    seconds: float
    data_wait_seconds: float
    """Of `seconds`: this rank's waiting for micro-batches."""
    skipped: bool
    """Loss or gradient norm is not finite: the step changed nothing."""
    skipped_steps: int
    """Of the run so far."""
    bad_samples: list[int]
    """Samples of the micro-batches whose loss is not finite."""
    spike: Spike | None
    plateau: Plateau | None = None
    """The loss was found flat with this step."""


class Reporter:
    """Only the main rank's says anything; the others are built with enabled=False."""

    def __init__(
        self, config: RunConfig, enabled: bool, first_step: int, last_step: int, continues: bool = False
    ) -> None:
        """continues: the run goes on from a checkpoint of its own checkpoint.save_dir."""
        self.config = config
        self.enabled = enabled
        self.last_step = last_step
        self.console = Terminal()
        self._seconds_per_step: float | None = None
        self._writer: Boards | None = None
        self._jsonl: StepLog | None = None
        self._saved: dict[str, Any] = {}
        self._good_step = first_step or None
        self._good_at = time.monotonic()
        self._logged_step = first_step
        self._first_step = first_step + 1
        self._rollbacks: list[Rollback] = []
        self._held_out: list[dict[str, Any]] = []
        self._changes: Sequence[Change] = ()
        if not enabled:
            return
        self._writer = Boards(config, first_step, continues, self.say)
        if config.logging.jsonl_path:
            path, save_dir = Path(config.logging.jsonl_path), config.checkpoint.save_dir
            self._jsonl = StepLog(path, first_step, save_dir, continues, self.say)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # no step comes that they could stand with
        if self._jsonl is not None and self._held_out:
            self._jsonl.amend(_without_nan({"held_out": self._held_out}))
        if self._jsonl is not None and "failed_saves" in self._saved:
            self._jsonl.write(_without_nan({"step": self._logged_step, **self._saved}))
        if self._writer is not None:
            self._writer.close()
        if self._jsonl is not None:
            self._jsonl.close()
        self.console.close()

    def say(self, message: object) -> None:
        """A line or a table in the terminal."""
        if self.enabled:
            self.console.print(message)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """A two-column table in the terminal."""
        if self.enabled:
            self.console.print(two_columns(title, rows))

    def begins(self, changes: Sequence[Change]) -> None:
        """The first step is about to be done. changes: of the configuration, since the checkpoint that it follows."""
        if self._writer is not None:
            self._changes = changes
            self._writer.begin(changes)

    def step(self, record: StepRecord) -> None:
        """Log a step; the terminal gets every logging.interval_steps-th, the first and the last."""
        if not self.enabled:
            return
        # an exponential mean: single steps are noisy, the first one warms everything up
        previous = self._seconds_per_step
        self._seconds_per_step = record.seconds if previous is None else 0.9 * previous + 0.1 * record.seconds
        if self._jsonl is not None:
            more: dict[str, Any] = dict(self._saved)
            if record.step == self._first_step:
                more["start_seconds"] = time.time() - psutil.Process().create_time()
                more |= {"save_dir": self.config.checkpoint.save_dir, "run_dir": self.config.run_dir}
                if self._changes:
                    more["changed"] = {one.field: [one.old, one.new] for one in self._changes}
            if self._held_out:
                more["held_out"] = self._held_out
            if self._rollbacks and record.step == self._rollbacks[-1].to_step + 1:
                more["rollbacks"] = [asdict(one) for one in self._rollbacks]
            if self.config.checkpoint.save_dir:
                more |= {"checkpoint_step": self._good_step, "checkpoint_age_seconds": self._checkpoint_age()}
            self._jsonl.write(_without_nan({**asdict(record), **more}))
        self._saved, self._held_out, self._logged_step = {}, [], record.step
        if self._writer is not None:
            for name, value in self._scalars(record).items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, record.step)
            if self.config.checkpoint.save_dir:
                self._writer.add_scalar("checkpoint/age_seconds", self._checkpoint_age(), record.step)
        if record.skipped:
            self._fault("skipped", record.step, skipped_text(record))
        if record.spike is not None:
            self._fault("spike", record.step, spike_text(record.spike), f"\nt: {record.spike.t}")
        if record.plateau is not None:
            self._fault("plateau", record.step, record.plateau.text(self.config.schedule.plateau_nats_per_doubling))
        if record.step % self.config.logging.interval_steps == 0 or record.step in (1, self.last_step):
            self.console.print(self._line(record))

    def rolled_back(self, rollback: Rollback) -> None:
        """Log a return to a checkpoint; the steps after it leave the logs, for they come again. In the JSONL log it
        stands with the step that follows the checkpoint."""
        if not self.enabled:
            return
        if self._rollbacks and self._rollbacks[-1].to_step != rollback.to_step:
            self._rollbacks = []
        self._rollbacks.append(rollback)
        self._held_out = [one for one in self._held_out if one["step"] <= rollback.to_step]
        if self._writer is not None:
            self._writer.go_back(rollback.to_step)
        if self._jsonl is not None:
            self._jsonl.go_back(rollback.to_step)
        self._fault("rollback", rollback.to_step, rollback_text(rollback))

    def compute_times(self, step: int, times: ComputeTimes) -> None:
        """Log how long each rank computed, and name the slowest where it is well above the others."""
        if not self.enabled:
            return
        if self._writer is not None:
            for name, value in times.scalars().items():
                self._writer.add_scalar(f"stragglers/{name}", value, step)
        if (text := times.straggler(self.config.faults.straggler_ratio)) is not None:
            self._fault("straggler", step, text)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Curves by their names, of what some runs have."""
        if self._writer is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)

    def _fault(self, kind: str, step: int, text: str, more: str = "") -> None:
        """What someone may have to look at: in the terminal at any interval, and among TensorBoard's texts."""
        self.console.print(f"step {step:>7}  {text}")
        if self._writer is not None:
            self._writer.add_text(f"faults/{kind}", text + more, step)

    def save_begins(self) -> None:
        """The state of now is about to become a checkpoint: the steps that led to it are to last as long."""
        if self._jsonl is not None:
            self._jsonl.make_durable()

    def saves(self, outcomes: Sequence[SaveOutcome]) -> None:
        """Log checkpoints that have become durable, or have not; in the JSONL log they stand with the next step."""
        if not self.enabled:
            return
        for outcome in outcomes:
            if outcome.error is not None:
                self._failed_save(outcome, outcome.error)
                continue
            self._good_step, self._good_at = outcome.step, time.monotonic() - outcome.seconds
            self._saved |= {"save_seconds": outcome.seconds, "save_stall_seconds": outcome.stall_seconds}
            self.console.print(
                f"saved {outcome.path}: {outcome.nbytes / 1e6:,.1f} MB in {outcome.seconds:.1f} s, the run waited "
                f"{outcome.stall_seconds:.2f} s"
            )
            for warning in outcome.warnings:
                self.console.print(warning)
            if self._writer is not None:
                self._writer.add_scalar("checkpoint/save_seconds", outcome.seconds, outcome.step)
                self._writer.add_scalar("checkpoint/stall_seconds", outcome.stall_seconds, outcome.step)
                self._writer.add_scalar("checkpoint/failed_saves", 0, outcome.step)

    def _failed_save(self, outcome: SaveOutcome, error: str) -> None:
        age, most = timedelta(seconds=round(self._checkpoint_age())), self.config.checkpoint.max_failed_saves
        good = f"the last good checkpoint, of step {self._good_step}, stays" if self._good_step else "there is none yet"
        row = f"{outcome.failures} in a row" + (f", checkpoint.max_failed_saves {most}" if most else "")
        text = f"could not be saved: {error}\n  the run goes on; {good}: {age} of work are in no checkpoint ({row})"
        self.console.print(f"step {outcome.step}: {text}")
        self._saved.setdefault("failed_saves", []).append({"step": outcome.step, "error": error})
        if self._writer is not None:
            self._writer.add_text("faults/save", text, outcome.step)
            self._writer.add_scalar("checkpoint/failed_saves", outcome.failures, outcome.step)

    def _checkpoint_age(self) -> float:
        """Seconds of this process's work that would be lost now."""
        return time.monotonic() - self._good_at

    def held_out(self, step: int, figures: HeldOut, ema: bool = False) -> None:
        """Log a validation, of the weights or of their moving average; in the JSONL log it stands with the next step,
        or the last one."""
        if not self.enabled:
            return
        window_tokens = self.config.data.sequence_length
        self._held_out.append({"step": step, "ema": ema, **as_record(figures, window_tokens)})
        if self._writer is not None:
            for name, value in scalars(figures, window_tokens):
                self._writer.add_scalar(name.replace("validation/", "validation_ema/", 1) if ema else name, value, step)
        mean, what = figures.mean, "EMA: " if ema else ""
        self.console.print(f"step {step:>7}  {what}held-out bound {summary(mean)}  ({mean.num_tokens:,} tokens)")
        if len(figures.texts) > 1:
            for text in figures.texts:
                self.console.print(f"{'':>14}{text.name}: {summary(text)}")

    def _line(self, record: StepRecord) -> str:
        left = timedelta(seconds=round((self._seconds_per_step or 0.0) * (self.last_step - record.step)))
        mfu = f"  MFU {record.mfu:.1%}" if record.mfu is not None else ""
        diffusion = self.config.diffusion
        bound = "" if diffusion.loss_is_bound or record.bound is None else f"  bound {record.bound:8.4f}"
        unit = "nats/token" if diffusion.loss_is_bound else "(reweighted)"
        return (
            f"step {record.step:>7}/{self.last_step}  loss {record.loss:8.4f} {unit}{bound}  "
            f"masked CE {record.masked_cross_entropy:7.4f}  {record.tokens_per_second:9,.0f} tokens/s{mfu}  "
            f"grad norm {record.grad_norm:8.3f}  lr {record.lr:.3e}  ETA {left}"
        )

    def _scalars(self, record: StepRecord) -> dict[str, float]:
        scalars = {
            "loss/masked_cross_entropy_nats": record.masked_cross_entropy,
            "optimizer/grad_norm": record.grad_norm,
            "optimizer/learning_rate": record.lr,
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/tflops_per_device": record.tflops,
            "speed/step_seconds": record.seconds,
            "progress/consumed_samples": record.consumed_samples,
            "progress/consumed_tokens": record.consumed_tokens,
            "speed/data_wait_seconds": record.data_wait_seconds,
            "faults/skipped_steps": record.skipped_steps,
        }
        if not self.config.diffusion.loss_is_bound:
            scalars["loss/objective"] = record.loss
        if record.bound is not None:
            scalars["loss/nats_per_token"] = record.bound
        for name, epochs in record.epochs.items():
            scalars[f"progress/epoch/{name}" if name else "progress/epoch"] = epochs
        if record.mfu is not None:
            scalars["speed/mfu"] = record.mfu
        width = 1.0 / len(record.cross_entropy_by_t)
        for bucket, value in enumerate(record.cross_entropy_by_t):
            if value is not None:
                scalars[f"masked_cross_entropy_by_t_nats/{bucket * width:.1f}-{(bucket + 1) * width:.1f}"] = value
        return scalars


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return value


def skipped_text(record: StepRecord) -> str:
    """A bad step, for the terminal."""
    where = f"; not finite in {_list(record.bad_samples)}" if record.bad_samples else ""
    return (
        f"skipped: loss {record.loss:.4f}, grad norm {record.grad_norm:.3f}, samples {record.first_sample} to "
        f"{record.consumed_samples - 1}{where}; weights and optimizer stay as they were"
    )


def spike_text(spike: Spike) -> str:
    """A loss spike, for the terminal."""
    excess = (spike.loss - spike.median) / spike.standard_deviation
    return (
        f"loss spike: {spike.loss:.4f} nats/token is {excess:.1f} standard deviations above the median "
        f"{spike.median:.4f}; samples {spike.first_sample} to {spike.end_sample - 1}, "
        f"t {min(spike.t):.3f} to {max(spike.t):.3f}, mean {fmean(spike.t):.3f} (`illada sample INDEX` shows them)"
    )


def rollback_text(rollback: Rollback) -> str:
    """A return to a checkpoint, for the terminal."""
    return (
        f"rolled back from step {rollback.from_step} to {rollback.checkpoint}: "
        f"{len(rollback.bad_samples)} bad steps in a row; samples {rollback.first_sample} to "
        f"{rollback.end_sample - 1} are passed over from now on"
    )


def _list(samples: Sequence[int]) -> str:
    shown = ", ".join(map(str, samples[:8]))
    return f"{shown} and {len(samples) - 8} more" if len(samples) > 8 else shown

"""What the user sees of a run: tables and lines in the terminal, scalars in TensorBoard, one JSON object a step."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from illada_megatron.checkpoint.saver import SaveOutcome
from illada_megatron.config import RunConfig
from illada_megatron.runtime.tables import two_columns
from illada_megatron.training.validation import HeldOut


@dataclass(frozen=True)
class StepRecord:
    """One training step, at full precision."""

    step: int
    """Steps done, this one included."""
    loss: float
    """nats/token: sum(CE / p) / tokens."""
    masked_cross_entropy: float
    """nats per masked token."""
    cross_entropy_by_t: list[float | None]
    grad_norm: float
    lr: float
    tokens_per_second: float
    tflops: float
    """Achieved TFLOP/s of a device."""
    mfu: float | None
    consumed_samples: int
    consumed_tokens: int
    epochs: dict[str, float]
    """How often each corpus of the blend was read, by its name; "" where there is one."""
    seconds: float
    data_wait_seconds: float
    """Of `seconds`: this rank's waiting for micro-batches."""


class Reporter:
    """Only the main rank's says anything; the others are built with enabled=False."""

    def __init__(self, config: RunConfig, enabled: bool, first_step: int, last_step: int) -> None:
        self.config = config
        self.enabled = enabled
        self.last_step = last_step
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._seconds_per_step: float | None = None
        self._writer: SummaryWriter | None = None
        self._jsonl: TextIO | None = None
        self._saved: dict[str, float] = {}
        if not enabled:
            return
        if config.logging.tensorboard_dir:
            # purge: what an interrupted run logged after the checkpoint that this one continues from
            self._writer = SummaryWriter(config.logging.tensorboard_dir, purge_step=first_step + 1)
        if config.logging.jsonl_path:
            self._jsonl = _continue_log(Path(config.logging.jsonl_path), first_step)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._jsonl is not None:
            self._jsonl.close()

    def say(self, message: object) -> None:
        """A line or a table in the terminal."""
        if self.enabled:
            self.console.print(message)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """A two-column table in the terminal."""
        if self.enabled:
            self.console.print(two_columns(title, rows))

    def step(self, record: StepRecord) -> None:
        """Log a step; the terminal gets every logging.interval_steps-th, the first and the last."""
        if not self.enabled:
            return
        # an exponential mean: single steps are noisy, the first one warms everything up
        previous = self._seconds_per_step
        self._seconds_per_step = record.seconds if previous is None else 0.9 * previous + 0.1 * record.seconds
        if self._jsonl is not None:
            self._jsonl.write(json.dumps({**asdict(record), **self._saved}) + "\n")
            self._jsonl.flush()
            self._saved = {}
        if self._writer is not None:
            for name, value in self._scalars(record).items():
                self._writer.add_scalar(name, value, record.step)
        if record.step % self.config.logging.interval_steps == 0 or record.step in (1, self.last_step):
            self.console.print(self._line(record))

    def saves(self, outcomes: Sequence[SaveOutcome]) -> None:
        """Log checkpoints that have become durable, or have not; in the JSONL log they stand with the next step."""
        if not self.enabled:
            return
        for outcome in outcomes:
            if outcome.error is not None:
                self.console.print(
                    f"step {outcome.step}: could not be saved: {outcome.error}\n  the run goes on; the last good "
                    "checkpoint stays, the next save tries again"
                )
                continue
            self._saved = {"save_seconds": outcome.seconds, "save_stall_seconds": outcome.stall_seconds}
            self.console.print(
                f"saved {outcome.path}: {outcome.nbytes / 1e6:,.1f} MB in {outcome.seconds:.1f} s, the run waited "
                f"{outcome.stall_seconds:.2f} s"
            )
            for warning in outcome.warnings:
                self.console.print(warning)
            if self._writer is not None:
                self._writer.add_scalar("checkpoint/save_seconds", outcome.seconds, outcome.step)
                self._writer.add_scalar("checkpoint/stall_seconds", outcome.stall_seconds, outcome.step)

    def held_out(self, step: int, figures: HeldOut) -> None:
        """Log a validation."""
        if not self.enabled:
            return
        if self._writer is not None:
            self._writer.add_scalar("validation/bound_nats_per_token", figures.bound, step)
            self._writer.add_scalar("validation/masked_cross_entropy_nats", figures.masked_cross_entropy, step)
        self.console.print(
            f"step {step:>7}  held-out bound {figures.bound:.4f} nats/token  "
            f"masked CE {figures.masked_cross_entropy:.4f}  ({figures.num_tokens:,} tokens)"
        )

    def _line(self, record: StepRecord) -> str:
        left = timedelta(seconds=round((self._seconds_per_step or 0.0) * (self.last_step - record.step)))
        mfu = f"  MFU {record.mfu:.1%}" if record.mfu is not None else ""
        return (
            f"step {record.step:>7}/{self.last_step}  loss {record.loss:8.4f} nats/token  "
            f"masked CE {record.masked_cross_entropy:7.4f}  {record.tokens_per_second:9,.0f} tokens/s{mfu}  "
            f"grad norm {record.grad_norm:8.3f}  lr {record.lr:.3e}  ETA {left}"
        )

    @staticmethod
    def _scalars(record: StepRecord) -> dict[str, float]:
        scalars = {
            "loss/nats_per_token": record.loss,
            "loss/masked_cross_entropy_nats": record.masked_cross_entropy,
            "optimizer/grad_norm": record.grad_norm,
            "optimizer/learning_rate": record.lr,
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/tflops_per_device": record.tflops,
            "speed/step_seconds": record.seconds,
            "progress/consumed_samples": record.consumed_samples,
            "progress/consumed_tokens": record.consumed_tokens,
            "speed/data_wait_seconds": record.data_wait_seconds,
        }
        for name, epochs in record.epochs.items():
            scalars[f"progress/epoch/{name}" if name else "progress/epoch"] = epochs
        if record.mfu is not None:
            scalars["speed/mfu"] = record.mfu
        width = 1.0 / len(record.cross_entropy_by_t)
        for bucket, value in enumerate(record.cross_entropy_by_t):
            if value is not None:
                scalars[f"masked_cross_entropy_by_t_nats/{bucket * width:.1f}-{(bucket + 1) * width:.1f}"] = value
        return scalars


def _continue_log(path: Path, first_step: int) -> TextIO:
    """Open a JSONL log for appending, without what an interrupted run wrote after step `first_step`: those steps will
    come again. A last line that was cut short goes too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > first_step:
                break
            kept.append(line)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
    return path.open("a")

"""What surrounds the steps: checkpoints, faults, logs, the device."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from illada_megatron.config.schema.base import Section


class CheckpointConfig(Section):
    """Directories, or `s3://bucket/prefix` (docs/checkpoint.md)."""

    save_dir: str | None = None
    """None: nothing is saved."""
    load_dir: str | None = None
    """Where to start from the first time. A checkpoint in save_dir goes first: a restarted run continues itself."""
    interval_steps: PositiveInt | None = None
    """None: only at the end and on SIGTERM/SIGINT."""
    asynchronous: bool = True
    """Write while the run goes on; it waits for a copy in memory only (as large as what a rank writes)."""
    save_timeout_minutes: PositiveFloat = 30.0
    """A save that takes longer has failed; one that does not end at all ends the run, at the next save."""
    max_failed_saves: PositiveInt | None = 5
    """So many in a row end the run, to be started again; None: it goes on."""
    keep_last: PositiveInt | None = None
    """Complete checkpoints that are kept; older ones go when a newer one is complete. None: all are kept."""
    keep_every: PositiveInt | None = None
    """Beside them, those whose step is a multiple of this."""
    verify: bool = True
    """Compare the checksum of every file before loading; False: its size only."""
    allow_mismatch: list[Literal["model", "tokenizer", "data"]] = []
    """What may differ from the run that saved the checkpoint; without it a difference is an error. tokenizer: from what
    manifests say, too."""

    @validator(mode="after")
    def _check(self) -> Self:
        if self.save_dir is not None and self.save_dir.rstrip("/").rpartition("/")[2].startswith("step_"):
            raise ValueError(
                f"save_dir {self.save_dir} is named like one checkpoint (step_...), but is to hold a directory for "
                "each: take another name"
            )
        return self


class FaultsConfig(Section):
    """What a run does when a step, a rank or a machine misbehaves (docs/faults.md)."""

    max_bad_steps: PositiveInt = 5
    """A step whose loss or gradient norm is NaN or infinite changes nothing; so many in a row are too many..."""
    on_bad_steps: Literal["stop", "rollback"] = "stop"
    """...and the run ends with an error, or loads its newest checkpoint and goes on behind their samples."""
    rollback_margin_steps: NonNegativeInt = 100
    """rollback: the samples of so many steps before the first bad one are left out too, as far as they follow the
    checkpoint: the same steps, done again, would lead to the same weights (PaLM, arXiv 2204.02311 section 5.1)."""
    max_rollbacks: PositiveInt = 3
    """rollback: to one and the same checkpoint; the run ends with an error where it then comes to bad steps again."""
    spike_window_steps: Annotated[int, Field(ge=10)] | None = 100
    """A step's loss is compared with those of so many good steps before it; None: it is not."""
    spike_threshold: PositiveFloat = 8.0
    """A spike lies above their median by more than this many standard deviations (1.4826 times the median absolute
    deviation)."""
    watchdog_seconds: PositiveInt | Literal["auto"] | None = "auto"
    """A rank that makes no progress reports and exits, so that the run can be started again. auto: after ten times the
    longest of its last hundred steps, or validations, and 300 s at least; an hour for the start, the first step, a
    save and a rollback. A number: of seconds for a step; everything else has ten times as long, the start an hour at
    least. None: nobody watches."""
    straggler_ratio: Annotated[float, Field(gt=1.0)] = 1.2
    """A rank that computes longer than this many times the median of those that do the same is named."""


class LoggingConfig(Section):
    tensorboard_dir: str | None = None
    interval_steps: PositiveInt = 10
    jsonl_path: str | None = None
    """One JSON object a step (what TensorBoard gets, at full precision)."""
    wandb_project: str | None = None
    """What TensorBoard gets goes to this project at Weights & Biases, too; whose, and with which key, the package
    `wandb` finds by itself (`wandb login`, WANDB_ENTITY). Needs run_dir."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: into run_dir alone, without a network; `wandb sync` sends it later."""


class RuntimeConfig(Section):
    device: Literal["auto", "cuda", "cpu"] = "auto"
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    num_threads: PositiveInt | None = None
    """CPU threads of a rank; None: cores / ranks on this machine."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """A collective that takes longer fails its rank. Where a machine vanishes without a word, the others notice after
    this time at the latest."""
    peak_tflops: PositiveFloat | None = None
    """The device's dense peak in the run's precision, for MFU; None: known devices only."""

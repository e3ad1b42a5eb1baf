"""What a step does with a batch: loss, optimizer, schedule, loop, validation."""

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from illada_megatron.config.schema.base import Dtype, Precision, Probability, Recompute, Section, Seed


class LossConfig(Section):
    """The masked linear cross-entropy (docs/masked_loss.md)."""

    implementation: Literal["auto", "reference", "fused"] = "auto"
    """auto: fused (compiled) where it can run, else the reference in torch; the table at start says which."""
    chunk_memory_mb: PositiveInt | None = None
    """What the logits that exist at a time may take (MB, 10^6 bytes); None: 40 million logits on a CPU
    (80 MB in bf16), 2 % of a GPU's memory."""
    z_loss: NonNegativeFloat = 0.0
    """c of the penalty c (log Z)^2 on the softmax's normalizer (arXiv 2204.02311, section 5)."""


class OptimizerConfig(Section):
    """AdamW. Norm weights are not decayed (Megatron's habit)."""

    weight_decay: NonNegativeFloat = 0.1
    embedding_weight_decay: NonNegativeFloat | None = None
    """Of the embedding, which is the head too where they are tied; None: weight_decay."""
    embedding_lr_mult: PositiveFloat = 1.0
    """The embedding's learning rate is the schedule's times this."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    adam_eps: PositiveFloat = 1e-8
    moments_dtype: Dtype = "fp32"
    """Of Adam's two moments; bf16 saves 4 bytes a parameter, divided as they are, and rounds them at each step
    (docs/training.md). Checkpoints fit either."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Keep a moving average of the weights too: after each step ema = d ema + (1 - d) w, with d = min(ema_decay,
    (1 + n) / (10 + n)) after n steps. 4 bytes a parameter, divided as Adam's moments are. None: not kept."""

    @validator(mode="after")
    def _check(self) -> Self:
        # bf16 has 8 bits: a second moment changes by (1 - beta2) (g^2 / v - 1) of itself, rounded to 1 / 256
        if self.moments_dtype == "bf16" and self.adam_beta2 > 0.99:
            raise ValueError(
                f"moments_dtype bf16 needs adam_beta2 of 0.99 at most, found {self.adam_beta2}: smaller changes of the "
                "second moment than 1 in 256 are rounded away; lower adam_beta2, or set moments_dtype=fp32"
            )
        return self


Shape = Literal["linear", "cosine", "minus_sqrt"]


class RateChange(Section):
    """Another learning rate from a place of the run on."""

    from_tokens: NonNegativeInt | None = None
    """The first step that begins at or after this many consumed tokens; where the batch ramps up, as papers count."""
    from_step: NonNegativeInt | None = None
    """Instead of from_tokens."""
    lr: NonNegativeFloat
    shape: Literal["constant"] | Shape = "constant"
    """constant: `lr` at once; else from the rate before to `lr`, reached where the next change (the last one: the run)
    begins (ends)."""

    @validator(mode="after")
    def _check(self) -> Self:
        if (self.from_tokens is None) == (self.from_step is None):
            raise ValueError(
                f"from_tokens {self.from_tokens} and from_step {self.from_step}: give one of them, and the other not"
            )
        return self


GONE_PLATEAU_FIELDS = {"plateau_window_steps": 500, "plateau_min_improvement": 0.002}
"""Of the plateau's earlier rule, with their defaults."""


class ScheduleConfig(Section):
    """Learning rate: linear warm-up to training.lr, constant, `changes` where a paper has some, decay.

    iLLaDA decays only when the loss has flattened. `decay_start` says when: a step (int), a fraction of
    training.train_steps (float), "never", "now" (the step at which the run is resumed, once) or "plateau"."""

    warmup_steps: NonNegativeInt = 100
    changes: list[RateChange] = []
    """Ascending, all by tokens or all by steps."""
    min_lr: NonNegativeFloat = 0.0
    decay_style: Shape = "cosine"
    """From the rate before to min_lr. At progress x is left of the way: linear 1 - x, cosine (1 + cos(pi x)) / 2,
    minus_sqrt 1 - sqrt(x) (the 1-sqrt of arXiv 2405.18392; Megatron's name)."""
    decay_start: NonNegativeInt | Probability | Literal["never", "now", "plateau"] | None = None
    """None: 0.8, or never where there are `changes`, which say it all."""
    decay_steps: PositiveInt | None = None
    """Length of the decay; None: until training.train_steps."""
    plateau_nats_per_doubling: PositiveFloat = 0.01
    """The loss is flat where it would fall, and rise, by less than this if the run's tokens were doubled. That is
    announced once; with decay_start "plateau" the decay begins."""
    plateau_min_tokens: NonNegativeInt | None = None
    """Not before this many tokens; None: a tenth of the run."""

    @validator(mode="before")
    @classmethod
    def _without_old_rule(cls, values: Any) -> Any:
        """Configurations written before the plateau's rule changed name its two fields; they say nothing any more."""
        if not isinstance(values, dict):
            return values
        for name, default in GONE_PLATEAU_FIELDS.items():
            if name not in values:
                continue
            found = values[name]
            if found != default and values.get("decay_start") == "plateau":
                raise ValueError(
                    f"{name} {found} belongs to a rule that is gone (windows of equal length): leave it out and set "
                    "plateau_nats_per_doubling; where a checkpoint has stored it, override decay_start"
                )
            values = {key: value for key, value in values.items() if key != name}
        return values

    @validator(mode="after")
    def _check(self) -> Self:
        for field in ("from_tokens", "from_step"):
            places = [getattr(change, field) for change in self.changes]
            if None not in places and places != sorted(set(places)):
                raise ValueError(f"changes begin at {field} {places}, expected ascending numbers")
        if len({change.from_tokens is None for change in self.changes}) > 1:
            raise ValueError("changes name from_tokens and from_step: count all of them by tokens, or all by steps")
        if self.changes and isinstance(self.decay_start, int | float):
            raise ValueError(
                f"changes and decay_start {self.decay_start} both say when the rate falls: write the decay as the last "
                "of changes and leave decay_start out"
            )
        return self


class Seeds(NamedTuple):
    """Of a run's draws."""

    init: int
    data: int
    noise: int


class ProfileConfig(Section):
    """A record of a few steps (docs/training.md)."""

    steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    """The first and the last, counted from 1; those after a resume too. The first ones of a start are slower than the
    others."""
    ranks: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    tool: Literal["torch", "nsys"] = "torch"
    """torch: a trace of torch's profiler in run_dir/traces; nsys: names and limits for NVIDIA's, which has started the
    run."""
    memory: bool = False
    """torch: what is allocated, too; on a GPU with a snapshot of its memory."""

    @validator(mode="after")
    def _check(self) -> Self:
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"steps {self.steps}: the first one is behind the last: turn them round")
        if self.tool == "nsys" and self.memory:
            raise ValueError(
                "memory true needs tool torch, found nsys, which has an option of its own: set memory=false"
            )
        return self


class TrainingConfig(Section):
    """The loop."""

    lr: PositiveFloat = 2e-4
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt = 8
    rampup_batch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """(start, increment, samples): Megatron's ramp-up, from start to global_batch_size in steps of increment over
    that many samples."""
    pad_global_batch: bool | None = None
    """Let data-parallel sizes that do not divide the batch fill the last places of each step with samples of weight 0,
    which cost time and change nothing; without it they are an error. None: with `--nnodes MIN:MAX`, where a run goes on
    with fewer machines, true; else false."""
    train_steps: PositiveInt = 1000
    exit_steps: PositiveInt | None = None
    """Save and stop at this step although the schedule is made for train_steps."""
    precision: Precision = "bf16"
    """Of weights and activations. fp8: bf16, with the layers' linear products as the section `fp8` says. Adam, main
    weights, gradients and the loss are fp32 in all of them."""
    seed: Seed = 1234
    init_seed: Seed | None = None
    data_seed: Seed | None = None
    noise_seed: Seed | None = None
    """Of the initial weights, of the order of the data, and of t, masks and segments; None: seed."""
    profile: ProfileConfig | None = None
    """`training.profile={steps: [10, 12], ranks: [0]}`; None: nothing is recorded."""
    deterministic: bool = False
    """The same bits from the same inputs, layout, machines and versions (docs/training.md); on GPUs it takes time."""
    recompute: Recompute = "none"
    """Activation recomputation: the attention core (selective; only Transformer Engine's, the local layers make again
    what is cheap in any case, docs/cpu_kernels.md) or whole layers (full)."""

    @property
    def seeds(self) -> Seeds:
        """What each kind of draw is keyed with."""
        own = (self.init_seed, self.data_seed, self.noise_seed)
        return Seeds(*(self.seed if one is None else one for one in own))


class ValidationConfig(Section):
    """The held-out bound: windows, times and masks of its own, whatever training's are, so that two runs' figures
    differ by the model alone (diffusion/held_out.py)."""

    interval_steps: PositiveInt | None = None
    """None: no validation while training."""
    num_samples: PositiveInt = 64
    """While training, of each held-out text (each of data.validation_paths, or each corpus of a blend)."""
    evaluate_samples: PositiveInt = 1024
    """The same of `illada evaluate`. More than a text has windows: each comes several times, with other masks."""
    seed: Seed = 4321
    """Of windows, times and masks; apart from training.seed, so that runs of several seeds compare."""

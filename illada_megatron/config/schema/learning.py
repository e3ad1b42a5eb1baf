"""What a step does with a batch: loss, optimizer, schedule, loop, validation."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from illada_megatron.config.schema.base import Dtype, Probability, Recompute, Section, Seed


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
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""


class ScheduleConfig(Section):
    """Learning rate in units of training samples' steps: linear warm-up, constant, decay (warm-up -> stable -> decay).

    iLLaDA decays only when the loss has flattened. `decay_start` says when: a step (int), a fraction of
    training.train_steps (float), "never", "now" (the step at which the run is resumed, once) or "plateau"."""

    warmup_steps: NonNegativeInt = 100
    min_lr: NonNegativeFloat = 0.0
    decay_style: Literal["cosine", "linear"] = "cosine"
    decay_start: NonNegativeInt | Probability | Literal["never", "now", "plateau"] = 0.8
    decay_steps: PositiveInt | None = None
    """Length of the decay; None: until training.train_steps."""
    plateau_window_steps: PositiveInt = 500
    """plateau: the mean loss of the last window is compared with the one before it..."""
    plateau_min_improvement: NonNegativeFloat = 0.002
    """...and the decay starts when it fell by less than this fraction."""


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
    precision: Dtype = "bf16"
    seed: Seed = 1234
    recompute: Recompute = "none"
    """Activation recomputation: the attention core (selective; only Transformer Engine's, the local layers make again
    what is cheap in any case, docs/cpu_kernels.md) or whole layers (full)."""


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

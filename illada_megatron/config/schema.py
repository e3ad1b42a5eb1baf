"""The schema: one class a concern, field names as in Megatron and the papers. Together they make the `RunConfig` of
`layout.py`, which also checks them against each other."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
"""A word of the keys that noise is drawn with (`diffusion/noise.py`)."""
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]


class Section(BaseModel):
    # strict: "8" is not 8 and 1.5 is not 1; an int is still accepted where a float is expected
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelConfig(Section):
    """The mask predictor (ILLaDA: a Llama block without the causal mask, no dropout, no time input)."""

    num_layers: PositiveInt = 4
    hidden_size: PositiveInt = 256
    ffn_hidden_size: PositiveInt = 704
    num_attention_heads: PositiveInt = 8
    num_query_groups: PositiveInt = 2
    """KV heads. Equal to num_attention_heads: multi-head attention; fewer: grouped-query attention."""
    kv_channels: PositiveInt | None = None
    """Size of a head; None: hidden_size / num_attention_heads."""
    add_qkv_bias: bool = False
    """Biases at the query, key and value projections, as Qwen2 has them; nothing else has one."""
    vocab_size: PositiveInt = 8000
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding has vocab_size rounded up to this multiple. The padded size does not depend on the layout,
    padded rows never enter the loss."""
    mask_token_id: NonNegativeInt = 5
    max_sequence_length: PositiveInt = 8192
    """Longest sequence the model is meant for (exported as max_position_embeddings)."""
    tie_word_embeddings: bool = True
    rotary_base: PositiveFloat = 500000.0
    norm_epsilon: PositiveFloat = 1e-5
    logit_softcap: NonNegativeFloat = 0.0
    """Logits become s tanh(logit / s), in training and generation; 0: they stay as they are."""
    init_method_std: PositiveFloat = 0.02
    """Linear weights N(0, std); o_proj and down_proj N(0, std / sqrt(2 * num_layers))."""
    embedding_init_std: PositiveFloat | None = None
    """None: sqrt(1 / (2 * hidden_size)), as in the released iLLaDA code."""

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple

    @property
    def num_parameters(self) -> int:
        """Parameters of the model as built, padded vocabulary rows included."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_attention_heads + 2 * self.num_query_groups)
        if self.add_qkv_bias:
            attention += d * (self.num_attention_heads + 2 * self.num_query_groups)
        layer = attention + 3 * h * self.ffn_hidden_size + 2 * h
        embeddings = self.padded_vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + h + embeddings

    @validator(mode="after")
    def _check(self) -> Self:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                "change one of them, or give kv_channels"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}: change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(f"the size of a head is {self.head_dim}; rotary embeddings need an even one: kv_channels")
        if self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is not below vocab_size {self.vocab_size}: "
                "give the id that the tokenizer reserves for the mask"
            )
        return self


class LayoutChoice(Section):
    """A layout that the run may take, whole: a field that is left out has the value written here."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    sequence_parallel: bool = False
    micro_batch_size: PositiveInt | None = None
    """None: training.micro_batch_size."""
    recompute: Recompute | None = None
    """None: training.recompute. Fewer ranks hold larger parts of the optimizer's state."""


class ParallelConfig(Section):
    """The layout. data_parallel_size is what is left of the world."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks on a pipeline rank (interleaved 1F1B); None or 1: not interleaved."""
    data_parallel_size: PositiveInt | None = None
    """None: world size / (TP * PP). A number is checked against the world."""
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: PositiveInt | None = None
    """Overlapped gradients and weights are exchanged in buckets of this many parameters or more, on the first pipeline
    stage; elsewhere as a whole. None: megatron-core's max(40 million, 1 million * data-parallel ranks)."""
    layouts: list[LayoutChoice] = []
    """Layouts that the run may take, in order of preference: at each start the first that fits the number of ranks
    replaces the fields above, with the global batch unchanged. Empty: only the fields above."""


class DiffusionConfig(Section):
    """The noising process (arXiv 2502.09992 section 2; 2606.25331 section 2)."""

    eps: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-3
    """p = (1 - eps) * t + eps. Only Bernoulli masks use it."""
    t_sampling: Literal["uniform", "stratified", "antithetic"] = "stratified"
    t_group_size: PositiveInt = 8
    """Stratified: consecutive samples that share one partition of [0, 1)."""
    mask_sampling: Literal["bernoulli", "exact_count"] = "bernoulli"
    """exact_count: k = ceil(t * length) positions, p = k / length."""
    attention_boundary: Literal["split", "document", "truncate", "none"] = "split"
    """Which tokens of a sequence see each other: see the two fields below; document: tokens of one document
    (boundaries from the .idx); none: all."""
    split_probability: Probability = 0.3
    """split: probability of cutting a sequence into two segments that do not attend to each other (iLLaDA)."""
    truncate_probability: Probability = 0.01
    """truncate: probability of shortening a sequence to a random length (LLaDA)."""


CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class BlendEntry(Section):
    """One corpus of a blend."""

    name: CorpusName
    """In logs, in `phases`, and in the key of its order: another name is another order."""
    paths: Annotated[list[str], Field(min_length=1)]
    """As data.train_paths."""
    weight: NonNegativeFloat = 1.0
    """Its share of the samples is weight / sum of the weights."""
    max_epochs: PositiveFloat | None = None
    """How often the run may read it; see data.epoch_limit."""


class BlendPhase(Section):
    """New weights from a number of consumed tokens on, as annealing has them."""

    from_tokens: PositiveInt
    weights: dict[CorpusName, NonNegativeFloat]
    """By name; a corpus left out is not read in this phase."""


class DataConfig(Section):
    """What is read."""

    train_paths: list[str] = []
    """Manifests (`name.manifest.json`, also `s3://…`), prefixes (`dir/name` for `dir/name.bin` + `dir/name.idx`) or
    globs of prefixes, in order: one corpus. Or else `blend`."""
    max_epochs: PositiveFloat | None = None
    """Of train_paths; see epoch_limit."""
    blend: list[BlendEntry] = []
    """Several corpora in proportions that hold, over any prefix of the run, to less than one sample."""
    phases: list[BlendPhase] = []
    """Later weights of the blend, by ascending from_tokens."""
    epoch_limit: Literal["error", "warn"] = "error"
    """What happens at start when the whole run would read a corpus more often than its max_epochs."""
    validation_paths: list[str] = []
    """Held-out shards, as train_paths; none of them may be a training shard."""
    holdout_tokens: NonNegativeInt = 0
    """Instead of validation_paths: the last tokens of each training corpus, which training then leaves out."""
    tokenizer_path: str | None = None
    """A SentencePiece `.model` or a Hugging Face `tokenizer.json`."""
    sequence_length: PositiveInt = 512
    shuffle: bool = True
    loader_threads: PositiveInt = 2
    """Threads of a rank that build micro-batches while the model computes; more for object storage."""
    prefetch_microbatches: PositiveInt = 8
    """Micro-batches kept ready."""

    @validator(mode="after")
    def _check(self) -> Self:
        names = [entry.name for entry in self.blend]
        if self.train_paths and self.blend:
            raise ValueError("train_paths and blend are both given: name one corpus or a blend of several")
        if len(set(names)) < len(names):
            raise ValueError(f"the corpora of blend are named {names}, expected names that differ")
        starts = [phase.from_tokens for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases begin at from_tokens {starts}, expected ascending numbers")
        for phase in self.phases:
            if unknown := set(phase.weights) - set(names):
                raise ValueError(
                    f"the phase from_tokens {phase.from_tokens} weighs {sorted(unknown)}, blend has {names}: "
                    "correct the names"
                )
            if not any(phase.weights.values()):
                raise ValueError(f"the phase from_tokens {phase.from_tokens} has no positive weight: give one")
        if self.blend and not any(entry.weight for entry in self.blend):
            raise ValueError("blend has no positive weight: give one")
        if self.validation_paths and self.holdout_tokens:
            raise ValueError(
                f"validation_paths and holdout_tokens {self.holdout_tokens} are both given: keep one of them"
            )
        return self


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
    """The held-out bound: fixed samples, fixed masks, so that two runs' figures compare."""

    interval_steps: PositiveInt | None = None
    """None: no validation while training."""
    num_samples: PositiveInt = 64
    seed: Seed = 4321
    """Noise of the validation masks; apart from training.seed, so that runs of several seeds compare."""


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

"""What is read, and how it is noised."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from illada_megatron.config.schema.base import Probability, Section


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
    """Held-out shards, as train_paths, but each path is a text with figures of its own, named after its file; none of
    them may be a training shard."""
    holdout_tokens: NonNegativeInt = 0
    """Instead of validation_paths: so many tokens of each training corpus, in ranges spread evenly over it, which
    training then leaves out."""
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

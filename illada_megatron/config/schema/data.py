"""What is read, and how it is noised."""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from illada_megatron.config.schema.base import Probability, Section


class DiffusionConfig(Section):
    """The noising process (arXiv 2502.09992 section 2; 2606.25331 section 2)."""

    eps: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-3
    """p = (1 - eps) * m(t) + eps, m the noise schedule. Only Bernoulli masks use it."""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """The share m(t) of tokens masked at time t: t, or cos(pi / 2 * (1 - t)) (diffusion/schedule.py)."""
    t_min: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    t_max: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """t is drawn from [t_min, t_max). Within [0, 1] the loss is no bound any more, but the mean of a part of it."""
    t_per: Literal["sequence", "segment"] = "sequence"
    """segment: each segment of a split sequence, or each document, has a t of its own."""
    t_sampling: Literal["uniform", "stratified", "antithetic"] = "stratified"
    t_group_size: PositiveInt = 8
    """Stratified: consecutive samples that share one partition of [0, 1)."""
    mask_sampling: Literal["bernoulli", "exact_count"] = "bernoulli"
    """exact_count: k = ceil(m(t) * length) positions, p = k / length."""
    complementary_masks: bool = False
    """Samples 2k and 2k+1 are one window, masked at t and, where the first is clear, at 1 - t (docs/diffusion.md)."""
    loss_weight: Literal["bound", "clipped", "unweighted"] = "bound"
    """Of a masked token's cross-entropy (diffusion/weights.py). bound: m'(t) / p, the loss bounds the likelihood;
    clipped: no more than max_loss_weight; unweighted: the same at every t."""
    max_loss_weight: PositiveFloat = 10.0
    """clipped."""
    attention_boundary: Literal["split", "document", "truncate", "none"] = "split"
    """Which tokens of a sequence see each other: see the two fields below; document: tokens of one document
    (boundaries from the .idx); none: all."""
    split_probability: Probability = 0.3
    """split: probability of cutting a sequence into two segments that do not attend to each other (iLLaDA)."""
    truncate_probability: Probability = 0.01
    """truncate: probability of shortening a sequence to a random length (LLaDA)."""

    @property
    def sees_all_t(self) -> bool:
        """Only then can the bound be estimated from what is drawn."""
        return (self.t_min, self.t_max) == (0.0, 1.0)

    @property
    def loss_is_bound(self) -> bool:
        """The objective's expectation bounds the negative log-likelihood."""
        return self.loss_weight == "bound" and self.sees_all_t

    @property
    def samples_per_window(self) -> int:
        """So many consecutive samples are one window of the corpus."""
        return 2 if self.complementary_masks else 1

    @validator(mode="after")
    def _check(self) -> Self:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min {self.t_min} is not below t_max {self.t_max}: change one of them")
        if self.complementary_masks and (
            self.noise_schedule != "linear" or not math.isclose(self.t_min + self.t_max, 1.0)
        ):
            raise ValueError(
                "complementary_masks pairs t with 1 - t, which needs noise_schedule linear and t_min + t_max 1, found "
                f"{self.noise_schedule} and {self.t_min} + {self.t_max}: change them, or set complementary_masks=false"
            )
        return self


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


def weighted_paths(words: Sequence[str]) -> list[BlendEntry]:
    """`0.3 dir/a 0.7 dir/b`, Megatron's --data-path, as a blend of corpora named as their files. Empty: not every
    path has a weight before it."""
    weights = [_number(word) for word in words[::2]]
    paths = words[1::2]
    if not paths or len(weights) != len(paths) or None in weights or any(_number(path) is not None for path in paths):
        return []
    names: list[str] = []
    for path in paths:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", path.rstrip("/").rpartition("/")[2].removesuffix(".manifest.json"))
        again = sum(one == name or one.startswith(f"{name}_again") for one in names)
        names.append(f"{name}_again{again}" if again else name or "corpus")
    return [
        BlendEntry(name=name, paths=[path], weight=weight)
        for name, path, weight in zip(names, paths, weights, strict=True)
        if weight is not None
    ]


def blend_override(blend: Sequence[BlendEntry]) -> str:
    """As it is typed in a shell."""
    entries = ", ".join(f"{{name: {one.name}, paths: [{one.paths[0]}], weight: {one.weight:g}}}" for one in blend)
    return f"'data.blend=[{entries}]'"


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _require_no_weights(name: str, paths: Sequence[str]) -> None:
    if not any(_number(path) is not None for path in paths):
        return
    blend = weighted_paths(paths) if name == "train_paths" else []
    mend = f"write {blend_override(blend)} instead" if blend else "write paths alone"
    raise ValueError(f"{name} has numbers among its paths, {list(paths)}: weights belong to data.blend; {mend}")


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
    """A SentencePiece `.model` or a Hugging Face `tokenizer.json`, a directory with one, or `org/name` on the Hugging
    Face hub (from its cache, or the network)."""
    sequence_length: PositiveInt = 512
    shuffle: bool = True
    loader_threads: PositiveInt = 2
    """Threads of a rank that build micro-batches while the model computes; more for object storage."""
    prefetch_microbatches: PositiveInt = 8
    """Micro-batches kept ready."""

    @validator(mode="after")
    def _check(self) -> Self:
        _require_no_weights("train_paths", self.train_paths)
        _require_no_weights("validation_paths", self.validation_paths)
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

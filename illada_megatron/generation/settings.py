"""How a text is denoised: everything a request can choose."""

import math
import re
from dataclasses import dataclass, fields
from typing import Literal, get_args

Confidence = Literal["low_confidence", "random", "margin", "entropy"]
Reveal = Literal["steps", "threshold", "factor", "hierarchy"]
Eos = Literal["stop", "last", "never"]
Cache = Literal["none", "prefix", "dual", "vicinity", "delayed"]

_KINDS: dict[str, type] = {"block_length": int, "stop_pattern": str, "regex": str, "json_schema": str}
"""Of fields that may be None."""
_COLDEST = 1e-6
"""Below it a sample is the most probable token, but for ties, and quotients overflow."""


@dataclass(frozen=True)
class Settings:
    """Defaults: the paper's setting for the base model (1024 / 32 / 32).

    Raises:
        ValueError: a field is out of its range, or two do not go together.
    """

    # how long, and in which pieces
    gen_length: int = 1024
    """Most tokens that are appended to a prompt; the last block may be shorter than block_length."""
    block_length: int | None = 32
    """Masks denoised together; None: all of them (gen_length, or every mask of an infilling)."""
    fixed_length: bool = False
    """All gen_length masks are there from the start, as in LLaDA (arXiv 2502.09992); else a block is appended when the
    one before is done, as in iLLaDA (arXiv 2606.25331)."""

    # which masks a step reveals
    steps: int = 32
    """Denoising steps of a block, for `reveal="steps"`. A block with fewer masks than steps takes one step a mask."""
    remasking: Confidence = "low_confidence"
    """What a candidate's confidence is: its probability, uniform noise, how far the best is ahead of the second, or
    exp(-H) of the distribution's entropy H. All are from 0 to 1."""
    reveal: Reveal = "steps"
    """steps: the most confident, as many as make the block in `steps` steps. threshold: all from `threshold` up, the
    most confident always (Fast-dLLM, arXiv 2505.22618). factor: as many as are jointly sure (there too). hierarchy:
    of each run of masks the most confident too, from `low_threshold` up (dInfer, arXiv 2510.08666)."""
    threshold: float = 0.9
    low_threshold: float = 0.4
    factor: float = 1.0
    credit: bool = False
    """Adds to a token's logit for having been the best at its position in steps before (dInfer)."""

    # which token a mask becomes
    temperature: float = 0.0
    """0: the most probable token; from 1e-6 up: a sample of softmax(logits / temperature)."""
    top_k: int = 0
    """Samples only of the k most probable tokens; 0: of all."""
    top_p: float = 1.0
    """Samples only of the fewest tokens that together have this probability among those that top_k leaves."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the text holds already are divided by it, where they are above 0, else multiplied (CTRL,
    arXiv 1909.05858)."""
    guidance: float = 0.0
    """Classifier-free guidance s: logits u + (s + 1) (c - u), where u sees masks in place of the prompt (LLaDA)."""
    seed: int = 0

    # when it ends
    eos: Eos = "stop"
    """stop: the text ends at the first end-of-text token. last: so too, but a step reveals it after all else. never: it
    is no candidate."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings; looked for when a block is done."""
    stop_pattern: str | None = None
    """The same, a regular expression (Python's `re`)."""
    regex: str | None = None
    """The generated text matches this regular expression, whole (outlines-core's: no look-around, no references)."""
    json_schema: str | None = None
    """It is a JSON text that fits this schema."""
    end_think_boost: float = 0.0
    """Added, times progress ** end_think_power, to the logit of the next token of "</think>" at the leftmost mask,
    until the text has it (iLLaDA; 100 and power 3 in the paper, power 1 for HumanEval)."""
    end_think_power: float = 2.0

    # what is computed again
    cache: Cache = "none"
    """Which keys and values are kept from step to step (`caching.py`); all but none are approximations."""
    cache_refresh: int = 8
    """Steps after which the delayed cache computes everything again."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        self._check_types()
        for name in ("steps", "gen_length", "block_length", "cache_refresh"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        for name, choices in (("remasking", Confidence), ("reveal", Reveal), ("eos", Eos), ("cache", Cache)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"{name} must be one of {known}, found {getattr(self, name)!r}")
        if self.reveal == "steps" and self.block_length is not None and self.steps > self.block_length:
            raise ValueError(
                f"steps {self.steps} exceeds block_length {self.block_length}: "
                "a step reveals at least one token, so a block takes at most block_length steps"
            )
        self._check_ranges()
        self._check_ends()

    def _check_types(self) -> None:
        """Settings may come from JSON."""
        for field in fields(self):
            value, kind = getattr(self, field.name), _KINDS.get(field.name, type(field.default))
            if value is None and field.name in _KINDS:
                continue
            accepted = (int, float) if kind is float else kind
            if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{field.name} must be {kind.__name__}, found {value!r}")
        if not all(isinstance(one, str) for one in self.stop):
            raise ValueError(f"stop must be texts, found {self.stop!r}")

    def _check_ranges(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_k", 0, math.inf),
            ("guidance", 0.0, math.inf),
            ("factor", 0.0, math.inf),
            ("end_think_boost", 0.0, math.inf),
            ("end_think_power", 0.0, math.inf),
            ("seed", 0, 1 << 64),
        ):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"{name} must be a finite number from {low:g} up, found {getattr(self, name)}")
        if 0 < self.temperature < _COLDEST:
            raise ValueError(f"temperature must be 0 or from {_COLDEST:g} up, found {self.temperature}")
        for name in ("threshold", "low_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, found {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, found {self.repetition_penalty}")
        if self.reveal == "hierarchy" and self.low_threshold > self.threshold:
            raise ValueError(f"low_threshold {self.low_threshold} is above threshold {self.threshold}")
        if self.remasking == "random" and self.reveal != "steps":
            raise ValueError(f"remasking 'random' says nothing that reveal {self.reveal!r} could compare: use 'steps'")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p choose among samples: set a temperature above 0")

    def _check_ends(self) -> None:
        if self.regex is not None and self.json_schema is not None:
            raise ValueError("regex and json_schema are both given: a text follows one of them")
        if self.regex is not None or self.json_schema is not None:
            if self.eos == "never":
                raise ValueError(
                    "eos 'never' leaves a text that follows regex or json_schema no way to end: use 'stop'"
                )
            if self.stop or self.stop_pattern:
                raise ValueError("stop and stop_pattern would cut a text that follows regex or json_schema as a whole")
        if any(not one for one in self.stop):
            raise ValueError("stop holds an empty string, which every text holds")
        if self.stop_pattern is not None:
            try:
                pattern = re.compile(self.stop_pattern)
            except re.error as error:
                raise ValueError(f"stop_pattern {self.stop_pattern!r} is no regular expression: {error}") from error
            if pattern.match(""):
                raise ValueError(f"stop_pattern {self.stop_pattern!r} matches an empty text, which every text holds")

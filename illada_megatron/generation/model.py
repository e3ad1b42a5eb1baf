"""What the engine asks of a model: logits of a few positions of a few texts, in one pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Predict = Callable[[Tensor], Tensor]
"""tokens [b, s] int64 -> logits [b, s, v]"""
WHOLE = -1


@dataclass(frozen=True)
class Part:
    """One text's share of a pass."""

    tokens: Tensor
    """[n] int64 on the CPU: what is computed; the whole text where there are no kept keys and values."""
    wanted: Tensor
    """[m] int64 on the CPU: rows of `tokens` whose logits are wanted."""
    positions: Tensor | None = None
    """[n] int64, ascending: of `tokens` in the text; None: it is all of it."""
    kept: int = WHOLE
    """Which of the model's `keys and values` the pass reads and writes: all of the text's positions are attended to,
    those that are not computed as they were kept. WHOLE: none."""
    length: int = 0
    """Tokens of the text, where `kept` is one."""


class Model(Protocol):
    """A mask predictor. Ids from `vocab_size` on are no tokens."""

    vocab_size: int

    def logits(self, parts: Sequence[Part]) -> Tensor:
        """[sum of m, v] float32 or float64, on the device that computed them: rows of the first part's `wanted`, then
        of the second's, ... A row depends on nothing but its own part."""

    def keep(self, capacity: int) -> int:
        """Room for keys and values of a text of up to `capacity` tokens; its number, for `Part.kept`."""

    def forget(self, kept: int) -> None:
        """Give the room back."""


@runtime_checkable
class Divided(Protocol):
    """A model of which every rank has a part. One leads, and calls `logits`; the others follow."""

    ranks: int
    leads: bool

    def follow(self) -> Any:
        """Of the others: do what the leading rank needs, until it says what the end is, which is returned."""

    def end(self, said: Any) -> None:
        """Of the leading rank: the others' `follow` returns `said`."""


class FunctionModel:
    """Any function from whole texts to logits; it keeps nothing."""

    def __init__(self, predict: Predict, vocab_size: int) -> None:
        self.predict = predict
        self.vocab_size = vocab_size

    @torch.no_grad()
    def logits(self, parts: Sequence[Part]) -> Tensor:
        """Raises ValueError where the function returns another shape."""
        found = []
        for part in parts:
            logits = self.predict(part.tokens[None])
            expected = (1, part.tokens.numel(), self.vocab_size)
            if tuple(logits.shape) != expected:
                raise ValueError(f"predict must return logits {list(expected)}, found {list(logits.shape)}")
            found.append(logits[0, part.wanted.to(logits.device)])
        return torch.cat(found)

    def keep(self, capacity: int) -> int:  # noqa: ARG002 - called by name
        raise ValueError("a function from whole texts to logits keeps no keys and values: set cache to 'none'")

    def forget(self, kept: int) -> None:
        raise NotImplementedError("nothing is kept")

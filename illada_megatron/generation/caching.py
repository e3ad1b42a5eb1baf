"""What is computed again: the positions whose rows go through the layers in a step; the others' keys and values are
those that an earlier step has computed.

A rule is a function of (text, history) -> positions [n] ascending, or None for all of them. Everything being
bidirectional, each rule but none is an approximation: a token's keys and values change with every token that is
revealed, wherever it stands (docs/generation.md has what each one costs and changes). A new one is a line of RULES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from illada_megatron.generation.settings import Cache
from illada_megatron.generation.text import Text

_VICINITY = 16  # tokens on both sides of a block, and passes over everything at a text's start (dInfer)
_VICINITY_PASSES = 4


@dataclass
class History:
    """What was computed of a text."""

    passes: int = 0
    """Passes over the text so far."""
    block_passes: int = 0
    """Of these over the block in work."""
    since_refresh: int = 0
    """Passes since one computed everything."""
    revealed: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Positions that the pass before this one has revealed."""

    def begin_block(self) -> None:
        self.block_passes = 0

    def passed(self, everything: bool, revealed: Tensor) -> None:
        self.passes += 1
        self.block_passes += 1
        self.since_refresh = 1 if everything else self.since_refresh + 1
        self.revealed = revealed


Rule = Callable[[Text, History], Tensor | None]


def prefix(text: Text, history: History) -> Tensor | None:
    """A block's first pass computes everything, the others the block and what follows it (Fast-dLLM)."""
    return torch.arange(text.span[0], text.tokens.numel()) if history.block_passes else None


def dual(text: Text, history: History) -> Tensor | None:
    """A block's first pass computes everything, the others the block alone (Fast-dLLM)."""
    return torch.arange(*text.span) if history.block_passes else None


def vicinity(text: Text, history: History) -> Tensor | None:
    """The block with 16 tokens on both sides; everything in a text's first 4 passes and a block's first (dInfer)."""
    if history.passes < _VICINITY_PASSES or not history.block_passes:
        return None
    start, end = text.span
    return torch.arange(max(0, start - _VICINITY), min(text.tokens.numel(), end + _VICINITY))


def delayed(text: Text, history: History) -> Tensor | None:
    """Masks, and what the pass before has revealed: a token's keys and values are kept from the pass after the one that
    revealed it; every `cache_refresh` passes, and where a block is appended, everything (dKV-Cache, arXiv 2505.15781).
    """
    if not history.passes or history.since_refresh >= text.settings.cache_refresh:
        return None
    if not history.block_passes and int(text.appended[text.span[0]]) == text.step:
        return None  # the new masks have no keys yet, and every token sees them
    masked = text.tokens == text.mask_token_id
    masked[history.revealed] = True
    return masked.nonzero().flatten()


RULES: dict[Cache, Rule | None] = {
    "none": None,
    "prefix": prefix,
    "dual": dual,
    "vicinity": vicinity,
    "delayed": delayed,
}

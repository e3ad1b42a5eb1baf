"""A text that is being denoised: its tokens, which of them are masks, and how the others came."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from illada_megatron.generation.settings import Settings

GIVEN = -1  # step of a token that was not generated


@dataclass(eq=False)
class Text:
    """Tokens on the CPU, as they are after `step` steps. Filled in place by the engine."""

    tokens: Tensor
    """[s] int64"""
    settings: Settings
    mask_token_id: int
    infill: bool = False
    """Its masks are all that is filled in; else it is continued."""

    prompt: Tensor = field(init=False)
    """[s] bool: given, for guidance and for what ends the text."""
    order: Tensor = field(init=False)
    """[s] int64: step that revealed each; GIVEN."""
    appended: Tensor = field(init=False)
    """[s] int64: step before which each was appended; GIVEN where it was there from the start."""
    confidence: Tensor = field(init=False)
    """[s] float64: of each revealed token, as `settings.remasking` counts it; 1 where given, 0 where masked."""
    step: int = 0
    block: Tensor = field(init=False)
    """[m] int64: positions of the block in work that are still masked, ascending."""
    span: tuple[int, int] = (0, 0)
    """First position of the block in work, and one behind its last."""
    schedule: list[int] = field(default_factory=list)
    """Masks that each coming step of the block reveals, for `reveal="steps"`."""
    given: int = field(init=False)
    """Tokens of the prompt of a continued text."""

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1:
            raise ValueError(f"a text must be one sequence [s], found {list(self.tokens.shape)}")
        self.tokens = self.tokens.clone()
        masked = self.tokens == self.mask_token_id
        if masked.any() and not self.infill:
            raise ValueError(f"the prompt contains the mask token {self.mask_token_id}: infill fills it in")
        self.given = self.tokens.numel()
        self.prompt = ~masked
        self.order = torch.full_like(self.tokens, GIVEN)
        self.appended = torch.full_like(self.tokens, GIVEN)
        self.confidence = self.prompt.to(torch.float64)
        self.block = self.tokens.new_empty(0)
        if self.settings.fixed_length and not self.infill:
            self._append(self.settings.gen_length)

    def next_block(self) -> bool:
        """Begin the next block, where there is one."""
        length = self.settings.block_length
        masked = (self.tokens == self.mask_token_id).nonzero().flatten()
        if masked.numel() == 0 and not self.infill:
            room = self.given + self.settings.gen_length - self.tokens.numel()
            self._append(min(length or room, room))
            masked = torch.arange(self.tokens.numel() - min(length or room, room), self.tokens.numel())
        self.block = masked if length is None else masked[:length]
        if self.block.numel() == 0:
            return False
        self.span = int(self.block[0]), int(self.block[-1]) + 1
        self.schedule = masks_per_step(self.block.numel(), self.settings.steps)
        return True

    def has_more(self) -> bool:
        """Whether a block is left for `next_block`."""
        if self.infill or self.settings.fixed_length:
            return bool((self.tokens == self.mask_token_id).any())
        return self.tokens.numel() < self.given + self.settings.gen_length

    def reveal(self, rows: Tensor, tokens: Tensor, confidence: Tensor) -> Tensor:
        """Fill in `rows` [k] of the block with `tokens` [k]. Returns their positions; a step is over."""
        positions = self.block[rows]
        self.tokens[positions] = tokens
        self.confidence[positions] = confidence
        self.order[positions] = self.step
        left = torch.ones_like(self.block, dtype=torch.bool)
        left[rows] = False
        self.block = self.block[left]
        self.step += 1
        return positions

    def cut(self, length: int) -> None:
        """Leave out what is behind the first `length` tokens."""
        for name in ("tokens", "order", "appended", "confidence", "prompt"):
            setattr(self, name, getattr(self, name)[:length])

    @property
    def steps(self) -> int:
        """Steps that revealed something of `tokens`."""
        return int(self.order.max()) + 1 if self.order.numel() else 0

    @property
    def generated(self) -> Tensor:
        """[g] what follows the prompt of a continued text."""
        return self.tokens[self.given :]

    def _append(self, masks: int) -> None:
        more = self.tokens.new_full((masks,), self.mask_token_id)
        self.tokens = torch.cat((self.tokens, more))
        self.order = torch.cat((self.order, torch.full_like(more, GIVEN)))
        self.appended = torch.cat((self.appended, torch.full_like(more, self.step)))
        self.confidence = torch.cat((self.confidence, torch.zeros(masks, dtype=torch.float64)))
        self.prompt = torch.cat((self.prompt, torch.zeros(masks, dtype=torch.bool)))


def masks_per_step(masks: int, steps: int) -> list[int]:
    """How many of `masks` each step reveals: evenly, the remainder to the first steps, never 0."""
    steps = min(steps, masks)
    if steps == 0:
        return []
    each, remainder = divmod(masks, steps)
    return [each + 1] * remainder + [each] * (steps - remainder)

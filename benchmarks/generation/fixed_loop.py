"""What loops of fixed length over one text have alike."""

from abc import ABC, abstractmethod

import torch

from benchmarks.generation.shapes import Shape, prompt_tokens
from benchmarks.step.workloads import MASK_TOKEN_ID


class FixedLoop(ABC):
    """Blocks of the one prompt, each in the shape's steps."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._begin()

    def _begin(self) -> None:
        prompt = prompt_tokens(self._shape, self._shape.prompt)
        self._tokens = torch.tensor([prompt + [MASK_TOKEN_ID] * self._shape.gen_length])  # [1, s]
        self._blocks = 0

    @abstractmethod
    def _step(self, reveals: int) -> None:
        """Reveal so many masks of block `_blocks` in `_tokens`."""

    def warm_up(self) -> None:
        """A step, of which nothing is left."""
        self._step(1)
        self._begin()

    def block(self) -> None:
        """All steps of the next block."""
        for _ in range(self._shape.steps):
            self._step(self._shape.block_length // self._shape.steps)
        self._blocks += 1

    def texts(self) -> list[list[int]]:
        """[1][s], as far as they are."""
        found: list[list[int]] = self._tokens.tolist()
        return found

"""What the speed of generation is measured on. No torch here."""

from dataclasses import dataclass

from benchmarks.step.workloads import MASK_TOKEN_ID, TINY_WORKLOADS, WORKLOADS, Workload


@dataclass(frozen=True)
class Shape:
    """A model of random weights and the texts that it continues; lengths in tokens."""

    model: Workload
    prompts: tuple[int, ...]
    """Lengths of those that are continued together; `prompt` is one of them."""
    prompt: int
    """Length of the one that is continued alone."""
    gen_length: int = 128
    block_length: int = 32
    steps: int = 32
    """Of a block; the paper's."""

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def tokens(self) -> int:
        """Of the one text."""
        return self.prompt + self.gen_length

    @property
    def masked(self) -> list[int]:
        """Masks of the block before each of its steps."""
        each = self.block_length // self.steps
        return list(range(self.block_length, 0, -each))

    @property
    def limit(self) -> int:
        """Tokens of the longest text."""
        return max(self.prompts) + self.gen_length


def ragged(shortest: int, longest: int, count: int, one: int) -> tuple[int, ...]:
    """Lengths from `shortest` to `longest`, evenly, that nearest to `one` being it."""
    lengths = [shortest + (longest - shortest) * number // (count - 1) for number in range(count)]
    nearest = min(range(count), key=lambda number: abs(lengths[number] - one))
    return tuple(one if number == nearest else length for number, length in enumerate(lengths))


SHAPE = Shape(WORKLOADS["W2"], ragged(64, 512, 16, 288), 288)
TINY_SHAPE = Shape(TINY_WORKLOADS["W2"], ragged(4, 20, 4, 12), 12, gen_length=16, block_length=8, steps=2)

MODEL_SEED, PROMPT_SEED = 0, 1
INITIALIZER_RANGE = 0.06
"""Large enough that logits and confidences of positions differ by more than rounding."""


def prompt_tokens(shape: Shape, length: int) -> list[int]:
    """The same for everyone."""
    import numpy as np

    numbers = np.random.default_rng([PROMPT_SEED, length])
    return [int(one) for one in numbers.integers(MASK_TOKEN_ID + 1, shape.model.vocab_size, length)]

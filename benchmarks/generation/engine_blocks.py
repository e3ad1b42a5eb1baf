"""The package's engine, a block at a time."""

import torch

from benchmarks.generation.shapes import Shape, prompt_tokens
from benchmarks.step.workloads import MASK_TOKEN_ID
from illada_megatron.generation import Engine, Settings, Text, Words
from illada_megatron.generation.layers import LayerModel
from illada_megatron.generation.settings import Cache


class EngineBlocks:
    """Of prompts of these lengths together. They are fixed in length, as the authors' are: all have the same steps."""

    def __init__(self, model: LayerModel, shape: Shape, prompts: tuple[int, ...], cache: Cache) -> None:
        self._engine = Engine(model, Words(MASK_TOKEN_ID), model.pass_tokens)
        self._settings = Settings(
            gen_length=shape.gen_length,
            block_length=shape.block_length,
            steps=shape.steps,
            fixed_length=True,
            eos="never",
            cache=cache,
        )
        self._shape = shape
        self._prompts = prompts
        self._begin()

    def _begin(self) -> None:
        texts = [torch.tensor(prompt_tokens(self._shape, length)) for length in self._prompts]
        self._jobs = [self._engine.add(Text(one, self._settings, MASK_TOKEN_ID)) for one in texts]

    def warm_up(self) -> None:
        """A step, of which nothing is left."""
        self._engine.step()
        for job in self._jobs:
            self._engine.remove(job)
        self._begin()

    def block(self) -> None:
        """All steps of the next block."""
        for _ in range(self._shape.steps):
            self._engine.step()

    def texts(self) -> list[list[int]]:
        """[prompts][s], as far as they are."""
        return [job.text.tokens.tolist() for job in self._jobs]

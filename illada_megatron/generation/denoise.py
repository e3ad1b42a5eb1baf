"""Denoising: masked positions are revealed a few at a time, the most confident first.

Written for any `predict(tokens [b, s] int64) -> logits [b, s, v]`: v is the real vocabulary, without padding, and the
logits are on the tokens' device. Sampling follows LLaDA's blockwise procedure (arXiv 2502.09992, section 2.4 and its
appendix) with iLLaDA's variable length (arXiv 2606.25331).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from illada_megatron.diffusion.noise import uniforms

Predict = Callable[[Tensor], Tensor]  # tokens [b, s] int64 -> logits [b, s, v]
GIVEN = -1  # order of a token that was not generated


@dataclass(frozen=True)
class DenoiseConfig:
    """How masks are revealed. Defaults: the paper's setting for the base model (1024 / 32 / 32).

    Raises:
        ValueError: a field is out of its range.
    """

    steps: int = 32
    """Denoising steps of a block. A block with fewer masks than steps takes one step a mask."""
    block_length: int | None = 32
    """Masks denoised together; None: all of them (gen_length, or every mask of an infilling)."""
    gen_length: int = 1024
    """Most tokens that `generate` appends; the last block may be shorter than block_length."""
    temperature: float = 0.0
    """0: the most probable token; above: a sample of softmax(logits / temperature)."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which candidates of a step are kept: the most probable ones, or any."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "gen_length", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if self.block_length is not None and self.steps > self.block_length:
            raise ValueError(
                f"steps {self.steps} exceeds block_length {self.block_length}: "
                "a step reveals at least one token, so a block takes at most block_length steps"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number from 0 up, found {self.temperature}")
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking must be 'low_confidence' or 'random', found {self.remasking!r}")


@dataclass(frozen=True)
class Denoised:
    """A finished text and how it came about. Steps count from 0 over all blocks."""

    tokens: Tensor  # [s] int64
    order: Tensor  # [s] int64, step at which each position was revealed; GIVEN where it was not generated
    appended: Tensor  # [s] int64, step before which each position was appended; GIVEN where it was there from the start

    @property
    def steps(self) -> int:
        """Steps that revealed something of `tokens`."""
        return int(self.order.max()) + 1 if self.order.numel() else 0


def generate(
    predict: Predict,
    prompt_tokens: Tensor | Sequence[int],
    config: DenoiseConfig,
    mask_token_id: int,
    eos_token_id: int | None = None,
    stop: Callable[[Tensor], bool] | None = None,
) -> Denoised:
    """Continue a prompt block by block: append a block of masks, denoise it, stop or append the next.

    Args:
        predict: the model, on the whole sequence so far.
        prompt_tokens: `[p]` int64, p may be 0.
        eos_token_id: ends the text; what its block holds after the first EOS is cut off.
        stop: called after each block with the generated tokens `[g]`; true ends the text there.

    Returns:
        `Denoised` of prompt and continuation, at most p + gen_length tokens.

    Raises:
        ValueError: the prompt contains the mask token (that is `infill`'s task), or predict returns another shape or
            NaN.
    """
    tokens = torch.as_tensor(prompt_tokens, dtype=torch.int64)
    _check_sequence(tokens, "prompt_tokens")
    if (tokens == mask_token_id).any():
        raise ValueError(f"the prompt contains the mask token {mask_token_id}: use infill to fill it in")
    prompt_length = tokens.numel()
    order, appended = torch.full_like(tokens, GIVEN), torch.full_like(tokens, GIVEN)
    step, end = 0, prompt_length + config.gen_length
    while tokens.numel() < end:
        start = tokens.numel()
        block = tokens.new_full((min(config.block_length or end, end - start),), mask_token_id)
        tokens = torch.cat((tokens, block))
        order = torch.cat((order, torch.full_like(block, GIVEN)))
        appended = torch.cat((appended, torch.full_like(block, step)))
        positions = torch.arange(start, tokens.numel(), device=tokens.device)
        step = denoise_block(predict, tokens, order, positions, config, mask_token_id, step)
        ends = (tokens[start:] == eos_token_id).nonzero() if eos_token_id is not None else block[:0]
        if ends.numel():
            length = start + int(ends[0]) + 1
            return Denoised(tokens[:length], order[:length], appended[:length])
        if stop is not None and stop(tokens[prompt_length:]):
            break
    return Denoised(tokens, order, appended)


def infill(predict: Predict, tokens: Tensor | Sequence[int], config: DenoiseConfig, mask_token_id: int) -> Denoised:
    """Reveal every mask of `tokens` `[s]`, wherever it stands; what is around it, on both sides, is context.

    `block_length` counts masks from left to right (None: all at once); `gen_length` is not used. A prompt followed by
    n masks is LLaDA's generation of fixed length n.

    Raises:
        ValueError: predict returns another shape or NaN.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.int64).clone()
    _check_sequence(tokens, "tokens")
    order = torch.full_like(tokens, GIVEN)
    masked = (tokens == mask_token_id).nonzero().flatten()
    step = 0
    for positions in masked.split(config.block_length or max(1, masked.numel())):
        step = denoise_block(predict, tokens, order, positions, config, mask_token_id, step)
    return Denoised(tokens, order, torch.full_like(tokens, GIVEN))


@torch.no_grad()
def denoise_block(
    predict: Predict,
    tokens: Tensor,
    order: Tensor,
    positions: Tensor,
    config: DenoiseConfig,
    mask_token_id: int,
    first_step: int = 0,
) -> int:
    """Reveal `positions` `[m]` of `tokens` `[s]` in at most `config.steps` steps; fills `tokens`, `order` in place.

    Each step runs the model on the whole sequence, takes a candidate for every position still masked in the block, and
    keeps the most confident of them.

    Returns:
        The number of the step that follows.
    """
    step = first_step
    for reveal in masks_per_step(positions.numel(), config.steps):
        logits = predict(tokens[None])
        if logits.ndim != 3 or logits.shape[:2] != (1, tokens.numel()):
            raise ValueError(f"predict must return logits [1, {tokens.numel()}, v], found {list(logits.shape)}")
        candidates, confidence = _candidates(
            logits[0, positions], positions, tokens.numel(), config, mask_token_id, step
        )
        if confidence.isnan().any():
            raise ValueError(f"predict returned NaN at step {step}")
        kept = confidence.argsort(descending=True, stable=True)[:reveal]  # stable: of equals, the leftmost
        tokens[positions[kept]] = candidates[kept]
        order[positions[kept]] = step
        still_masked = torch.ones_like(positions, dtype=torch.bool)
        still_masked[kept] = False
        positions = positions[still_masked]
        step += 1
    return step


def masks_per_step(masks: int, steps: int) -> list[int]:
    """How many of `masks` each step reveals: evenly, the remainder to the first steps, never 0."""
    steps = min(steps, masks)
    if steps == 0:
        return []
    each, remainder = divmod(masks, steps)
    return [each + 1] * remainder + [each] * (steps - remainder)


def _candidates(
    logits: Tensor, positions: Tensor, length: int, config: DenoiseConfig, mask_token_id: int, step: int
) -> tuple[Tensor, Tensor]:
    """A token for each position and the confidence in it, both `[m]`, from `logits` `[m, v]`.

    All in float64: low-precision sampling is known to lower the effective temperature (arXiv 2409.02908).
    """
    logits = logits.to(torch.float64, copy=True)
    logits[:, mask_token_id] = -torch.inf  # a mask is never an answer
    probabilities = logits.softmax(-1)
    if config.temperature == 0:
        candidates = probabilities.argmax(-1)
    else:
        u = _position_noise("generation.candidate", positions, length, config, step)
        candidates = _sample(torch.softmax(logits / config.temperature, -1), u)
    if config.remasking == "random":
        return candidates, _position_noise("generation.confidence", positions, length, config, step)
    return candidates, probabilities.gather(1, candidates[:, None]).squeeze(1)


def _sample(probabilities: Tensor, u: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row of `[m, v]` at `u` `[m]`.

    The distribution is that of LLaDA's Gumbel-max with one random number a position instead of v. Tokens of
    probability 0 are never taken.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulative, torch.minimum(u * total, below_total)[:, None], right=True).squeeze(1)


def _position_noise(purpose: str, positions: Tensor, length: int, config: DenoiseConfig, step: int) -> Tensor:
    """Uniforms `[m]`, a function of (seed, purpose, step, position): not of the device or of what else is masked."""
    noise = uniforms(config.seed, purpose, step, length)
    return torch.from_numpy(noise).to(positions.device)[positions]


def _check_sequence(tokens: Tensor, name: str) -> None:
    if tokens.ndim != 1:
        raise ValueError(f"{name} must be one sequence [s], found {list(tokens.shape)}")

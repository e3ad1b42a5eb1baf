"""Loss curves as a run of illada-8b might have them, with a step's noise: what a rule has to tell apart."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from illada_megatron.config import RunConfig, load_config

Curve = NDArray[np.float64]
CHANGE, SPIKE, FLAT = 0.5, 0.6, 0.4
"""Where in the run the mixture changes, the spike comes and the plateau begins."""


@dataclass(frozen=True)
class Case:
    """A curve, and the configuration under which the run had it."""

    name: str
    config: RunConfig
    curve: Curve
    """Expected loss of each step (nats/token)."""
    flat_from: int | None = None
    """The step from which on it is flat; None: it falls to the end."""


def cases(train_steps: int | None = None) -> list[Case]:
    """The curves over a run of illada-8b's tokens. train_steps: in fewer, larger steps; None: in the preset's."""
    preset = load_config("illada-8b")
    tokens = preset.training.train_steps * preset.training.global_batch_size * preset.data.sequence_length
    steps = train_steps or preset.training.train_steps
    batch = round(tokens / steps / preset.data.sequence_length)
    sizes = [f"training.train_steps={steps}", f"training.global_batch_size={batch}"]
    sizes.append(f"schedule.warmup_steps={steps * preset.schedule.warmup_steps // preset.training.train_steps}")
    config = load_config("illada-8b", sizes)
    change = round(CHANGE * steps)
    blend = "data.blend=[{name: web, paths: [web]}, {name: math, paths: [math]}]"
    from_tokens = change * batch * config.data.sequence_length
    phases = f"data.phases=[{{from_tokens: {from_tokens}, weights: {{math: 1.0}}}}]"
    told = load_config("illada-8b", [*sizes, blend, phases])

    place = np.arange(1, steps + 1) * float(batch * config.data.sequence_length)
    falling = chinchilla(place)
    shifted = np.where(np.arange(steps) < change, falling, 1.02 * falling)
    past = np.maximum(np.arange(steps) - round(SPIKE * steps), 0)
    spike = np.where(past > 0, np.exp(-past / (steps / 1000)), 0.0)
    flat = round(FLAT * steps)
    return [
        Case("power law", config, falling),
        Case("rise of 2 %, in data.phases", told, shifted),
        Case("rise of 2 %, untold", config, shifted),
        Case("spike of 1 nat", config, falling + spike),
        Case("plateau", config, np.maximum(falling, falling[flat]), flat),
    ]


def chinchilla(tokens: Curve) -> Curve:
    """Nats/token of a model of 7.6e9 parameters (arXiv 2203.15556, equation 10)."""
    return 1.69 + 406.4 / 7.6e9**0.34 + 410.7 / tokens**0.28


def noisy(curve: Curve, deviation: float, seed: int) -> Curve:
    """The curve with a step's noise of that standard deviation: a heavy tail (Student's t, 4 degrees of freedom), and a
    hundredth of the variance in a wandering that lasts some hundred steps."""
    generator = np.random.default_rng(seed)
    count = len(curve)
    white = generator.standard_t(4, count) * deviation * np.sqrt(0.99 / 2.0)
    knots = generator.standard_normal(count // 100 + 2)
    wandering = np.interp(np.arange(count) / 100, np.arange(len(knots)), knots) * deviation * np.sqrt(0.01 * 1.5)
    return curve + white + wandering

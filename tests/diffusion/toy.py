"""Six tokens whose likelihood bound is known exactly: an explicit joint distribution, whose conditional cross-entropy
for every set of masked positions is a table of 2^L rows."""

import math
from fractions import Fraction

import numpy as np

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion import make_masked_batch

L, VOCAB, MASK, SEED = 6, 3, 5, 2024


class OneText:
    """A corpus that repeats one sequence: only the noise varies."""

    def __init__(self, tokens: np.ndarray):
        self.tokens, self.sequence_length = tokens, len(tokens)

    def read(self, _, out: np.ndarray) -> None:
        out[:] = self.tokens

    def document_starts(self, _) -> np.ndarray:
        return np.empty(0, np.int64)


def joint_distribution() -> np.ndarray:
    """`[VOCAB] * L`, a chain with memory and a random tilt: masked neighbours make a token harder to guess."""
    rng = np.random.default_rng(4)
    joint = np.ones((VOCAB,) * L)
    for i in range(L - 1):
        follow = 1.0 + 4.0 * np.eye(VOCAB)[rng.permutation(VOCAB)]
        joint = joint * follow.reshape([VOCAB if axis in (i, i + 1) else 1 for axis in range(L)])
    joint *= rng.uniform(0.7, 1.3, joint.shape)
    return joint / joint.sum()


def cross_entropy_sums(joint: np.ndarray, text: np.ndarray) -> np.ndarray:
    """`[2^L]`: sum over the masked set's positions of -log P(token | tokens outside the set); bit i = position i."""
    sums = np.zeros(2**L)
    for code in range(2**L):
        masked = [i for i in range(L) if code >> i & 1]
        seen = joint[tuple(slice(None) if i in masked else int(text[i]) for i in range(L))]  # axes: masked
        for axis, i in enumerate(masked):
            marginal = seen.sum(tuple(other for other in range(len(masked)) if other != axis)) / seen.sum()
            sums[code] -= math.log(marginal[text[i]])
    return sums


JOINT = joint_distribution()
TEXT = np.array(np.unravel_index(JOINT.argmax(), JOINT.shape))
SUMS = cross_entropy_sums(JOINT, TEXT)
SIZES = np.array([code.bit_count() for code in range(2**L)])


def set_coefficients(mask_sampling: str, eps: float) -> list[Fraction]:
    """E[weight * 1{the masked set is M}] for |M| = 0..L, exactly (the empty set has no loss)."""
    if mask_sampling == "exact_count":  # k uniform on 1..L, weight L/k, each set of size k with probability 1/C(L, k)
        return [Fraction(0)] + [Fraction(1, L) * Fraction(L, k) / math.comb(L, k) for k in range(1, L + 1)]
    low = Fraction(eps)

    def integral(k: int) -> Fraction:  # of p^(k-1) (1-p)^(L-k) over [eps, 1], expanded
        terms = ((math.comb(L - k, j) * (-1) ** j, k + j) for j in range(L - k + 1))
        return sum((Fraction(c, n) * (1 - low**n) for c, n in terms), Fraction(0))

    return [Fraction(0)] + [integral(k) / (1 - low) for k in range(1, L + 1)]


def exact_bound(mask_sampling: str, eps: float) -> float:
    """Expected loss, nats per token, by enumeration of the 2^L masked sets."""
    coefficients = np.array([float(c) for c in set_coefficients(mask_sampling, eps)])
    return float((coefficients[SIZES] * SUMS).sum() / L)


def draw_losses(config: DiffusionConfig, samples: int, weight: str = "loss_weight") -> np.ndarray:
    """`[samples]` losses per token of the toy, from the batches that training would consume."""
    corpus, losses = OneText(TEXT), []
    for start in range(0, samples, 500):
        batch = make_masked_batch(corpus, range(start, start + 500), config, MASK, SEED)
        codes = ((batch.tokens == MASK).numpy() << np.arange(L)).sum(1)
        weights = getattr(batch, weight).numpy().max(1)  # one weight a sequence
        losses.append(weights * SUMS[codes] / L)
    return np.concatenate(losses)

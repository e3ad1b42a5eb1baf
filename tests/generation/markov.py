"""An exact mask predictor: the posterior of a Markov chain given the visible tokens, by forward-backward."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from illada_megatron.generation import Engine, FunctionModel, Predict, Settings, Text, Words

MASK = 0  # the mask token has a logit like any other; states are 1..n


class MarkovPredictor:
    """`predict` for a chain over tokens 1..n. Its logits are log posteriors, except that the mask token's is always the
    largest: a sampler that can produce masks does."""

    def __init__(self, initial: Tensor, transition: Tensor):
        self.initial, self.transition = initial.double(), transition.double()  # [n], [n, n]
        self.calls = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return torch.stack([self._logits(row) for row in tokens])

    def _logits(self, tokens: Tensor) -> Tensor:
        n, s = len(self.initial), len(tokens)
        evidence = torch.ones(s, n, dtype=torch.float64)
        for i, token in enumerate(tokens.tolist()):
            if token != MASK:
                evidence[i] = torch.eye(n, dtype=torch.float64)[token - 1]
        before, after = [self.initial], [torch.ones(n, dtype=torch.float64)]
        for i in range(s - 1):
            message = (before[-1] * evidence[i]) @ self.transition
            before.append(message / message.sum())
            message = self.transition @ (after[-1] * evidence[s - 1 - i])
            after.append(message / message.sum())
        posterior = torch.stack(before) * torch.stack(after[::-1])
        posterior /= posterior.sum(1, keepdim=True)
        return torch.cat((torch.full((s, 1), 100.0, dtype=torch.float64), posterior.log()), 1)

    def log_probability(self, states: tuple[int, ...]) -> float:
        p = self.initial[states[0] - 1]
        for a, b in itertools.pairwise(states):
            p = p * self.transition[a - 1, b - 1]
        return float(p.log())


def cycle(n: int = 5, sure: float = 0.97) -> MarkovPredictor:
    """1 -> 2 -> ... -> n -> 1, each with probability `sure`."""
    transition = torch.full((n, n), (1 - sure) / (n - 1))
    for state in range(n):
        transition[state, (state + 1) % n] = sure
    return MarkovPredictor(torch.full((n,), 1 / n), transition)


def drift() -> MarkovPredictor:
    """A token stays or goes one up (never down): what lies between two tokens depends on both."""
    transition = torch.tensor([[0.6, 0.4, 0.0, 0.0], [0.0, 0.6, 0.4, 0.0], [0.0, 0.0, 0.6, 0.4], [0.0, 0.0, 0.0, 1.0]])
    return MarkovPredictor(torch.tensor([0.4, 0.3, 0.2, 0.1]), transition)


def denoised(
    predict: Predict,
    tokens: Sequence[int] | Tensor,
    settings: Settings,
    eos: int | None = None,
    infill: bool = False,
    decode: Callable[[list[int]], str] | None = None,
) -> Text:
    """A text after all its steps."""
    model = FunctionModel(predict, len(predict.initial) + 1 if isinstance(predict, MarkovPredictor) else 6)
    engine = Engine(model, Words(MASK, eos))
    job = engine.add(Text(torch.as_tensor(tokens, dtype=torch.int64), settings, MASK, infill), decode)
    for _ in engine.run():
        pass
    return job.text

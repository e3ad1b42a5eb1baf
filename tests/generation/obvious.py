"""Masked-diffusion generation, slow and obvious: what tests compare the engine with.

One text, lists of Python numbers, every logit computed again in every step. Written from `Settings` and the papers it
names, by somebody who had not seen the engine: the two share the random numbers and nothing else.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from illada_megatron.diffusion.noise import uniforms
from illada_megatron.generation import Settings

Predict = Callable[[list[int]], list[list[float]]]
"""Tokens of the whole text to one list of logits a position."""


@dataclass(frozen=True)
class Outcome:
    tokens: list[int]
    order: list[int]
    """The step that revealed each token; -1: it was given."""
    finish: str
    """eos, stop or length."""
    characters: int | None
    """Of the generated text, those before a stop; None: all."""


def obvious(
    predict: Predict,
    tokens: list[int],
    settings: Settings,
    mask: int,
    eos: int | None,
    end_think: list[int],
    words: int,
    decode: Callable[[list[int]], str],
    infill: bool,
) -> Outcome:
    """Continues `tokens`, or fills the masks in them. Ids from `words` on are no candidates."""
    order = [-1] * len(tokens)
    job = _Job(predict, settings, mask, eos, end_think, words, decode, infill, len(tokens), list(tokens), order)
    if infill:
        masks = [position for position, token in enumerate(tokens) if token == mask]
        length = settings.block_length or len(masks)
        while masks:
            job.denoise(masks[:length])
            masks = masks[length:]
        return job.cut(len(tokens), "length", None)

    if settings.fixed_length:
        job.append(settings.gen_length)
    done = 0
    while done < settings.gen_length:
        length = min(settings.block_length or settings.gen_length, settings.gen_length - done)
        if not settings.fixed_length:
            job.append(length)
        job.denoise([job.given + done + i for i in range(length)])
        done += length
        ended = job.ended(done)
        if ended is not None:
            return ended
    return job.cut(job.given + done, "length", None)


@dataclass
class _Job:
    predict: Predict
    settings: Settings
    mask: int
    eos: int | None
    end_think: list[int]
    words: int
    decode: Callable[[list[int]], str]
    infill: bool
    given: int
    """Length of what the caller gave."""
    tokens: list[int]
    order: list[int]
    step: int = 0
    credit: dict[int, list[float]] = field(default_factory=dict)

    def append(self, count: int) -> None:
        self.tokens += [self.mask] * count
        self.order += [-1] * count

    def cut(self, length: int, finish: str, characters: int | None) -> Outcome:
        return Outcome(self.tokens[:length], self.order[:length], finish, characters)

    def ended(self, done: int) -> Outcome | None:
        """What is left of the text if it ends within its first `done` generated tokens."""
        before = self.tokens[self.given : self.given + done]
        at_eos = self.settings.eos != "never" and self.eos in before
        if at_eos:
            before = before[: before.index(self.eos)]
        text = self.decode(before)
        found = [text.index(stop) for stop in self.settings.stop if stop in text]
        if self.settings.stop_pattern is not None:
            match = re.search(self.settings.stop_pattern, text)
            if match is not None:
                found.append(match.start())
        if found:
            return self.cut(self.given + len(before), "stop", min(found))
        if at_eos:
            return self.cut(self.given + len(before) + 1, "eos", None)
        return None

    def denoise(self, block: list[int]) -> None:
        """Reveals the masks of a block, in as many steps as the rule takes."""
        steps = min(self.settings.steps, len(block))
        masks = list(block)
        self.credit = {}
        taken = 0
        while masks:
            logits = self.logits(masks)
            candidates = {position: self.candidate(logits[position], position) for position in masks}
            confidence = {p: self.confidence(logits[p], candidates[p], p) for p in masks}
            if self.settings.eos == "last" and any(candidates[p] != self.eos for p in masks):
                for position in masks:
                    if candidates[position] == self.eos:
                        confidence[position] -= 2
            if self.settings.reveal == "steps":
                count = len(block) // steps
                if taken < len(block) % steps:
                    count += 1
                revealed = ranked(confidence)[:count]
            else:
                revealed = sure(confidence, self.settings)
            for position in revealed:
                self.tokens[position] = candidates[position]
                self.order[position] = self.step
                masks.remove(position)
            self.step += 1
            taken += 1

    def logits(self, masks: list[int]) -> dict[int, list[float]]:
        """Of each mask of the block, with all that changes them."""
        everywhere = self.predict(self.tokens)
        logits = {position: list(everywhere[position]) for position in masks}
        if self.settings.guidance:
            self.guide(logits)
        for position in masks:
            for token in range(len(logits[position])):
                never = self.settings.eos == "never" and token == self.eos
                if token >= self.words or token == self.mask or never:
                    logits[position][token] = -math.inf
        if self.settings.end_think_boost and self.end_think and not self.infill:
            self.boost(logits[masks[0]], masks[0])
        if self.settings.repetition_penalty != 1:
            self.penalise(logits)
        if self.settings.credit:
            self.give_credit(logits)
        return logits

    def guide(self, logits: dict[int, list[float]]) -> None:
        """u + (s + 1) (c - u), with u of a text without its prompt (arXiv 2502.09992)."""
        unprompted = list(self.tokens)
        for position in range(self.given):
            if self.order[position] == -1:
                unprompted[position] = self.mask
        without = self.predict(unprompted)
        for position, conditional in logits.items():
            for token, c in enumerate(conditional):
                u = without[position][token]
                conditional[token] = u + (self.settings.guidance + 1) * (c - u)

    def boost(self, logits: list[float], position: int) -> None:
        """Towards the next token of "</think>" (arXiv 2606.25331)."""
        count = len(self.end_think)
        for start in range(self.given, len(self.tokens)):
            if self.tokens[start : start + count] == self.end_think:
                return
        matched = 0
        for length in range(1, count):
            if length <= position and self.tokens[position - length : position] == self.end_think[:length]:
                matched = length
        progress = min(1.0, max(0.0, (position - self.given + 1) / self.settings.gen_length))
        logits[self.end_think[matched]] += self.settings.end_think_boost * progress**self.settings.end_think_power

    def penalise(self, logits: dict[int, list[float]]) -> None:
        """Tokens that the text holds already (CTRL, arXiv 1909.05858)."""
        for position in logits:
            for token in set(self.tokens) - {self.mask}:
                if logits[position][token] > 0:
                    logits[position][token] /= self.settings.repetition_penalty
                else:
                    logits[position][token] *= self.settings.repetition_penalty

    def give_credit(self, logits: dict[int, list[float]]) -> None:
        """To tokens that were the best in this block's steps up to this one (arXiv 2510.08666)."""
        for position, row in logits.items():
            credit = self.credit.setdefault(position, [0.0] * len(row))
            for token in range(len(row)):
                credit[token] *= 0.8
            best = row.index(max(row))
            credit[best] += softmax(row)[best] ** 0.2
            for token in range(len(row)):
                row[token] += 0.7 * math.log(credit[token] + 1)

    def candidate(self, logits: list[float], position: int) -> int:
        if self.settings.temperature == 0:
            return logits.index(max(logits))
        drawn = uniforms(self.settings.seed, "generation.candidate", self.step, len(self.tokens))[position]
        return sample(logits, self.settings, float(drawn))

    def confidence(self, logits: list[float], candidate: int, position: int) -> float:
        rule = self.settings.remasking
        if rule == "random":
            return float(uniforms(self.settings.seed, "generation.confidence", self.step, len(self.tokens))[position])
        probabilities = softmax(logits)
        if rule == "low_confidence":
            return probabilities[candidate]
        if rule == "margin":
            best, second = sorted(probabilities, reverse=True)[:2]
            return best - second
        return math.exp(sum(p * math.log(p) for p in probabilities if p > 0))  # exp(-H)


def softmax(logits: list[float]) -> list[float]:
    most = max(logits)
    weights = [math.exp(x - most) for x in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def sample(logits: list[float], settings: Settings, drawn: float) -> int:
    """The token at which the cumulative sum of what top_k and top_p leave passes `drawn` of its total."""
    kept = list(range(len(logits)))
    if settings.top_k:
        least = sorted(logits, reverse=True)[min(settings.top_k, len(logits)) - 1]
        kept = [token for token in kept if logits[token] >= least]
    # of what top_k leaves, as in transformers
    probabilities = softmax(
        [x / settings.temperature if token in kept else -math.inf for token, x in enumerate(logits)]
    )
    if settings.top_p < 1:
        nucleus, total = [], 0.0
        for token in sorted(kept, key=lambda token: (-probabilities[token], token)):
            if total < settings.top_p:
                nucleus.append(token)
            total += probabilities[token]
        kept = sorted(nucleus)
    kept = [token for token in kept if probabilities[token] > 0]
    target = drawn * sum(probabilities[token] for token in kept)
    total = 0.0
    for token in kept:
        total += probabilities[token]
        if total > target:
            return token
    return kept[-1]  # rounding


def ranked(confidence: dict[int, float]) -> list[int]:
    """Positions, the most confident first; of equal ones the leftmost."""
    return sorted(confidence, key=lambda position: (-confidence[position], position))


def sure(confidence: dict[int, float], settings: Settings) -> list[int]:
    """The positions that threshold, factor or hierarchy reveal; never none."""
    order = ranked(confidence)
    revealed = [order[0]]
    if settings.reveal == "factor":
        for rank in range(2, len(order) + 1):
            if confidence[order[rank - 1]] < 1 - settings.factor / (rank + 1):
                break
            revealed.append(order[rank - 1])
        return revealed
    for position in order[1:]:
        if confidence[position] >= settings.threshold:
            revealed.append(position)
    if settings.reveal == "hierarchy":
        for run in runs(sorted(confidence)):
            best = ranked({position: confidence[position] for position in run})[0]
            if confidence[best] >= settings.low_threshold and best not in revealed:
                revealed.append(best)
    return revealed


def runs(positions: list[int]) -> list[list[int]]:
    """Neighbours together: 3 4 5, 8, 11 12."""
    together: list[list[int]] = []
    for position in positions:
        if together and together[-1][-1] == position - 1:
            together[-1].append(position)
        else:
            together.append([position])
    return together

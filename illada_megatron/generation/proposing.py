"""Who proposes: logits of a block's masks -> a candidate for each, and the confidence in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from illada_megatron.diffusion.noise import uniforms
from illada_megatron.generation.settings import Settings
from illada_megatron.generation.text import Text
from illada_megatron.ops.largest import largest, rows_at_once

_CREDIT_DECAY, _CREDIT_POWER, _CREDIT_WEIGHT = 0.8, 0.2, 0.7  # dInfer (arXiv 2510.08666)


@dataclass(frozen=True)
class Words:
    """Ids that mean something to the rules."""

    mask: int
    eos: int | None = None
    end_think: tuple[int, ...] = ()
    """What "</think>" is spelled in."""
    count: int | None = None
    """Ids that the tokenizer has words for; None: all that the model has."""
    special: Mapping[str, int] = field(default_factory=dict)
    """Special tokens, which a decoder leaves out, by their names."""

    def ends(self, settings: Settings) -> frozenset[int]:
        """Ids before the first of which a text ends: end-of-text, and special tokens that `stop` names."""
        named = {self.special[name] for name in settings.stop if name in self.special}
        return frozenset(named | ({self.eos} if self.eos is not None and settings.eos != "never" else set()))


@dataclass(frozen=True)
class Credit:
    """What tokens have gained at positions by having been the best there before: one entry for each pair."""

    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    amounts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    def after(self, positions: Tensor, tokens: Tensor, probabilities: Tensor) -> "Credit":
        """With a step's best token of each position that is masked, [m] each."""
        masked = torch.isin(self.positions, positions)
        key = torch.cat((self.positions[masked], positions)) << 32 | torch.cat((self.tokens[masked], tokens))
        gained = probabilities.to(torch.float64) ** _CREDIT_POWER
        amounts = torch.cat((self.amounts[masked] * _CREDIT_DECAY, gained))
        pairs, entry = key.unique(return_inverse=True)
        summed = torch.zeros(pairs.numel(), dtype=torch.float64).index_add(0, entry, amounts)
        return Credit(pairs >> 32, pairs & 0xFFFFFFFF, summed)


def propose(
    logits: Tensor, texts: Sequence[Text], words: Words, credits: Sequence[Credit]
) -> tuple[Tensor, list[Credit]]:
    """[2, m] float64, where the logits are: candidates, and the confidence in them, for the masks of each text's block,
    one text after the other. Confidence is NaN where the model returned NaN, or no token is possible. And the credits
    that count once the step is made.

    logits: [m, v], guidance done; changed in place. A GPU is made to wait by `credit` alone.
    """
    _exclude(logits, words)
    rows = [text.block.numel() for text in texts]
    given = zip(logits.split(rows), texts, credits, strict=True)
    after = [_edited(some, text, words, credit) for some, text, credit in given]
    best, rest = largest(logits)
    found = torch.stack((best.to(torch.float64), (1.0 + rest).reciprocal()))
    columns = zip(found.split(rows, dim=1), logits.split(rows), best.split(rows), texts, rest.split(rows), strict=True)
    for (candidates, confidence), some, best_of_text, text, others in columns:
        _choose_otherwise(candidates, confidence, some, best_of_text, others, text)
    found[1].masked_fill_(~_at(logits, best).isfinite(), torch.nan)
    return found, after


def _exclude(logits: Tensor, words: Words) -> None:
    """A mask is never an answer, nor an id without a word."""
    logits[:, words.mask] = -torch.inf
    if words.count is not None:
        logits[:, words.count :] = -torch.inf


def _edited(logits: Tensor, text: Text, words: Words, credit: Credit) -> Credit:
    """What a text's settings make of its rows, in place. Returns its credit after the step."""
    if text.settings.eos == "never" and words.eos is not None:
        logits[:, words.eos] = -torch.inf
    _boost_end_of_thinking(logits, text, words)
    if text.settings.repetition_penalty != 1:
        _penalise(logits, text, words.mask, text.settings.repetition_penalty)
    return _give_credit(logits, text, credit) if text.settings.credit else credit


def _choose_otherwise(
    candidates: Tensor, confidence: Tensor, logits: Tensor, best: Tensor, rest: Tensor, text: Text
) -> None:
    """In place, where a text does not take the most probable tokens, or does not count on their probability: so far
    `candidates` [m] are `best` [m], and `confidence` [m] is its probability. rest: [m] as of `largest`."""
    settings = text.settings
    if settings.temperature != 0:
        sampled = _sampled(logits, text)
        candidates.copy_(sampled)
        if settings.remasking == "low_confidence":
            gap = (_at(logits, sampled) - _at(logits, best)).to(torch.float64)
            confidence.copy_(gap.exp() / (1.0 + rest))
    if settings.remasking == "random":
        confidence.copy_(_position_noise("generation.confidence", text))
    elif settings.remasking == "margin":
        two = torch.cat([some.topk(2, dim=-1).values for some in logits.split(rows_at_once(logits))])
        first, second = two.to(torch.float64).unbind(-1)
        confidence.mul_(-torch.expm1(second - first))
    elif settings.remasking == "entropy":
        confidence.copy_(torch.cat([_exp_of_entropy(some) for some in logits.split(rows_at_once(logits))]))


def _boost_end_of_thinking(logits: Tensor, text: Text, words: Words) -> None:
    """iLLaDA's: at the leftmost mask, the token that continues what of "</think>" stands right before it."""
    settings, sequence = text.settings, list(words.end_think)
    if settings.end_think_boost == 0 or text.infill:
        return
    position = int(text.block[0])
    written = text.generated.tolist()
    if any(written[at : at + len(sequence)] == sequence for at in range(len(written) - len(sequence) + 1)):
        return
    before = text.tokens[:position].tolist()
    matched = next((n for n in range(min(len(sequence) - 1, len(before)), 0, -1) if before[-n:] == sequence[:n]), 0)
    progress = min(max((position - text.given + 1) / settings.gen_length, 0.0), 1.0)
    logits[0, sequence[matched]] += settings.end_think_boost * progress**settings.end_think_power


def _penalise(logits: Tensor, text: Text, mask: int, penalty: float) -> None:
    held = text.tokens[text.tokens != mask].unique().to(logits.device)
    found = logits[:, held]
    logits[:, held] = torch.where(found > 0, found / penalty, found * penalty)


def _give_credit(logits: Tensor, text: Text, credit: Credit) -> Credit:
    """C <- 0.8 C, C of the best token += p ** 0.2; logits + 0.7 ln(C + 1)."""
    best, rest = largest(logits)
    credit = credit.after(text.block, best.cpu(), (1.0 + rest).reciprocal().cpu())
    rows = torch.searchsorted(text.block, credit.positions)
    gained = _CREDIT_WEIGHT * (credit.amounts + 1).log()
    logits.index_put_((rows.to(logits.device), credit.tokens.to(logits.device)), gained.to(logits), accumulate=True)
    return credit


def _exp_of_entropy(logits: Tensor) -> Tensor:
    """[m, v] -> [m] float64: exp(-H)."""
    log_p = logits.to(torch.float64).log_softmax(-1)
    return (log_p.exp() * log_p.clamp_min(torch.finfo(torch.float64).min)).sum(-1).exp()


def _at(logits: Tensor, tokens: Tensor) -> Tensor:
    """[m, v] at tokens [m] -> [m]."""
    return logits.gather(1, tokens[:, None]).squeeze(1)


def _sampled(logits: Tensor, text: Text) -> Tensor:
    """[m] a sample of softmax(logits / T) for each, in float64: low-precision sampling is known to lower the effective
    temperature (arXiv 2409.02908)."""
    noise = _position_noise("generation.candidate", text).to(logits.device)
    pieces = zip(logits.split(rows_at_once(logits)), noise.split(rows_at_once(logits)), strict=True)
    return torch.cat([_sampled_at(some, text.settings, u) for some, u in pieces])


def _sampled_at(logits: Tensor, settings: Settings, u: Tensor) -> Tensor:
    """u: [m], where in the distribution of each."""
    scaled = logits.to(torch.float64)
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / settings.temperature  # what overflows is -inf, no more
    if settings.top_k and settings.top_k < scaled.shape[1]:
        least = scaled.topk(settings.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(-1)
    if settings.top_p < 1:
        probabilities = _nucleus(probabilities, settings.top_p)
    return sample(probabilities, u)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The most probable tokens whose predecessors have less than top_p together; the rest are 0."""
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return probabilities.scatter(1, tokens, ordered.masked_fill(before >= top_p, 0.0))


def sample(probabilities: Tensor, u: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row of `[m, v]` at `u` `[m]`.

    The distribution is that of LLaDA's Gumbel-max with one random number a position instead of v. Tokens of
    probability 0 are never taken. Of a row of NaN it is some token.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    found = torch.searchsorted(cumulative, torch.minimum(u * total, below_total)[:, None], right=True).squeeze(1)
    return found.clamp_max(probabilities.shape[1] - 1)  # an id that there is not would end a GPU's process


def _position_noise(purpose: str, text: Text) -> Tensor:
    """Uniforms [m] for the block's masks, a function of (seed, purpose, step, position): not of the device, of what
    else is masked or of what else is in the batch."""
    noise = uniforms(text.settings.seed, purpose, text.step, text.span[1])
    return torch.from_numpy(noise)[text.block]


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """u + (s + 1) (c - u) (arXiv 2502.09992, appendix A; after arXiv 2207.12598)."""
    return unconditional + (scale + 1) * (conditional - unconditional)

"""Text that a regular expression describes: which tokens a mask may become, and which of them together.

outlines-core makes a deterministic automaton of the expression whose letters are the vocabulary's tokens
(`indexing.py`). A text that is denoised knows some of its tokens and not others, in any order. So for each mask two
sets of states count: those in which the automaton may be before it (from the left, through what is known and whatever
is not), and those behind it from which the text can still end well in the tokens that are left (from the right). A
token is possible where it leads from one of the first to one of the second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada_megatron.generation.indexing import Edges
from illada_megatron.generation.text import Text

_States = NDArray[np.bool_]
_Edges = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Sources, tokens, targets."""
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Automaton:
    """Edges (state, token) -> state of a regular expression, and one more state, the last: behind the end of the text.
    An end-of-text token leads there from where a text may end, and stays there."""

    states: int
    """The last one among them."""
    sources: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """Ascending."""
    targets: NDArray[np.int64]
    distance: NDArray[np.int64]
    """[states] fewest tokens from each to where a text may end; 0 there."""
    follows: NDArray[np.bool_]
    """[states, states] whether some token leads from the first to the second."""
    start: int
    absorbed: frozenset[int] = frozenset()
    """Tokens whose first character, the space that some tokenizers put before a text, is none of the text where they
    begin it."""

    def edges(self, token: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """States that a token leads from, and to."""
        first, last = np.searchsorted(self.tokens, [token, token + 1])
        return self.sources[first:last], self.targets[first:last]


def automaton(edges: Edges, words: Mapping[bytes, Sequence[int]], eos: int, space_before: bool = False) -> Automaton:
    """Of the edges of an expression over the tokens `words`: bytes -> ids that are spelled so. space_before: a first
    token's space may be none of the text.

    A text holds no NUL.
    """
    end = edges.states
    final = np.append(edges.final, end)
    parts: list[_Edges] = [(edges.sources, edges.tokens, edges.targets)]
    parts.append((final, np.full(len(final), eos), np.full(len(final), end)))
    start, absorbed = 0, frozenset[int]()
    if space_before:
        start, absorbed = end + 1, _add_opening(parts, words, end + 1)
    sources, tokens, targets = (np.concatenate(of_all) for of_all in zip(*parts, strict=True))
    order = np.argsort(tokens, kind="stable")
    states = max(start, end) + 1
    follows = np.zeros((states, states), bool)
    follows[sources, targets] = True
    by_token = sources[order], tokens[order], targets[order]
    return Automaton(states, *by_token, _distances(follows, final), follows, start, absorbed)


def _add_opening(parts: list[_Edges], words: Mapping[bytes, Sequence[int]], opening: int) -> frozenset[int]:
    """A state before the first, with its edges, and with those of tokens that would be one without their space."""
    (sources, tokens, targets), ends = parts
    first = sources == 0
    literal = dict(zip(tokens[first].tolist(), targets[first].tolist(), strict=True))
    absorbed: dict[int, int] = {}
    for word, ids in words.items():
        if word[:1] == b" ":
            bare = words.get(word[1:], ())
            target = 0 if word == b" " else next((literal[one] for one in bare if one in literal), None)
            if target is not None:
                absorbed |= {one: target for one in ids if one not in literal}
    edges = np.array([*literal.items(), *absorbed.items()], np.int64).reshape(-1, 2)
    parts.append((np.full(len(edges), opening), edges[:, 0], edges[:, 1]))
    if 0 in ends[0]:  # the empty text is one
        parts.append((np.array([opening]), ends[1][:1], ends[2][:1]))
    return frozenset(absorbed)


def _distances(follows: _States, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    distance = np.full(len(follows), _NEVER)
    reached, steps = np.zeros(len(follows), bool), 0
    reached[ends] = True
    while reached.any():
        distance[reached] = steps
        reached, steps = np.logical_or.reduce(follows[:, reached], axis=1) & (distance == _NEVER), steps + 1
    return distance


class Constraint:
    """A text's."""

    def __init__(self, automaton: Automaton, text: Text) -> None:
        """Raises ValueError where no text that matches is short enough."""
        shortest = int(automaton.distance[automaton.start])
        if shortest == _NEVER:
            raise ValueError("no text of the tokenizer's tokens matches regex or json_schema")
        if shortest > text.settings.gen_length:
            raise ValueError(
                f"the shortest text that matches has {shortest} tokens, gen_length is {text.settings.gen_length}"
            )
        self._automaton = automaton
        self._state, self._position = automaton.start, text.given

    def allow(self, logits: Tensor, text: Text) -> None:
        """Exclude what cannot be at the block's masks: logits [m, v], changed in place."""
        known = text.tokens[text.span[0] : text.span[1]].tolist()
        behind = self._behind(text, known)
        before = self._before(text)
        row = 0
        for position, token in enumerate(known):
            possible = behind[position + 1]
            if token == text.mask_token_id:
                alive = before[self._automaton.sources] & possible[self._automaton.targets]
                excluded = np.ones(logits.shape[1], bool)
                excluded[self._automaton.tokens[alive]] = False
                logits[row].masked_fill_(torch.from_numpy(excluded).to(logits.device), -torch.inf)
                before = np.logical_or.reduce(self._automaton.follows[before])
                row += 1
            else:
                before = self._after(before, token)

    def settle(self, text: Text, rows: Tensor, candidates: Tensor) -> Tensor:
        """Those of `rows`, the surest first, whose candidates are possible together: each is possible alone, two may
        not be. What is left out is a later step's."""
        known = text.tokens[text.span[0] : text.span[1]].tolist()
        before, behind = self._before(text), self._behind(text, known)
        kept = []
        for row in rows.tolist():
            place = int(text.block[row]) - text.span[0]
            known[place] = int(candidates[row])
            changed = self._from_the_right(known[: place + 1], behind[place + 1], text.mask_token_id)
            if (changed[0] & before).any():
                kept.append(row)
                behind[: place + 2] = changed
            else:
                known[place] = text.mask_token_id
        if left := rows.numel() - len(kept):
            text.schedule[:1] = [left + sum(text.schedule[:1])]
        return rows[torch.isin(rows, torch.tensor(kept))]

    def joined(self, tokens: Sequence[int], spelled: Sequence[bytes]) -> str:
        """The text of generated tokens, of which half a character may be the last. spelled: of each id."""
        words = b"".join(spelled[token] for token in tokens)
        return words[int(len(tokens) > 0 and tokens[0] in self._automaton.absorbed) :].decode(errors="replace")

    def _before(self, text: Text) -> _States:
        """States before the block: one."""
        start = text.span[0]
        for token in text.tokens[self._position : start].tolist():
            sources, targets = self._automaton.edges(token)
            self._state = int(targets[sources == self._state][0])
        self._position = start
        states = np.zeros(self._automaton.states, bool)
        states[self._state] = True
        return states

    def _behind(self, text: Text, known: Sequence[int]) -> list[_States]:
        """For each place of the block, and behind it: states from which a text can still end well."""
        left = text.given + text.settings.gen_length - text.span[1]
        return self._from_the_right(known, self._automaton.distance <= left, text.mask_token_id)

    def _from_the_right(self, known: Sequence[int], behind: _States, mask: int) -> list[_States]:
        sets = [behind]
        for token in reversed(known):
            if token == mask:
                sets.append(np.logical_or.reduce(self._automaton.follows[:, sets[-1]], axis=1))
            else:
                sources, targets = self._automaton.edges(token)
                states = np.zeros(self._automaton.states, bool)
                states[sources[sets[-1][targets]]] = True
                sets.append(states)
        return sets[::-1]

    def _after(self, before: _States, token: int) -> _States:
        sources, targets = self._automaton.edges(token)
        states = np.zeros(self._automaton.states, bool)
        states[targets[before[sources]]] = True
        return states

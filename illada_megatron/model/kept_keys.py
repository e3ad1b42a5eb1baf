"""Attention of some of a text's tokens over all of it: keys and values of the others are those of an earlier pass."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.ops.segment_attention import rotate, segment_attention

if TYPE_CHECKING:
    from illada_megatron.model.packing import Segments


class KeptKeys:
    """Keys, turned by their positions, and values of texts, in every layer of this rank: one tensor a layer, in which
    a text has rows of its own. It grows where they do not suffice, up to a limit, before which texts move together; it
    is given back with the last text."""

    def __init__(self) -> None:
        self._spans: dict[int, tuple[int, int]] = {}
        self._layers: dict[int, Tensor] = {}
        self._rows = 0

    def __len__(self) -> int:
        """Texts that are kept."""
        return len(self._spans)

    def keep(self, text: int, capacity: int, most_rows: int = sys.maxsize) -> None:
        """Rows for a text of up to `capacity` tokens: the first gap that is long enough. Where that ends behind
        `most_rows`, other texts move: ask for `start` again. Raises ValueError where all texts have more together."""
        start = self._gap(capacity)
        if start + capacity > most_rows:
            used = sum(end - begin for begin, end in self._spans.values())
            if used + capacity > most_rows:
                raise ValueError(
                    f"keys and values of {used} tokens are kept, of {most_rows} may be: no room for {capacity} more"
                )
            self._close_gaps()
            start = used
        self._spans[text] = start, start + capacity
        if start + capacity > self._rows:
            self._rows = min(max(start + capacity, self._rows * 5 // 4), most_rows)
        for room in self._layers.values():
            room[start : start + capacity] = 0  # what no pass has computed is another text's, otherwise

    def _gap(self, capacity: int) -> int:
        """First row of the first one that is long enough, the end of all among them."""
        start = 0
        for begin, end in sorted(self._spans.values()):
            if begin - start >= capacity:
                break
            start = end
        return start

    def _close_gaps(self) -> None:
        """Texts move to the front, in their order."""
        start = 0
        for text, (begin, end) in sorted(self._spans.items(), key=lambda one: one[1]):
            stop = start + end - begin
            for room in self._layers.values() if begin > start else ():
                moved = room[begin:end].clone()  # of rows that it may overlap; a layer has those that a pass asked for
                room[start : start + len(moved)] = moved
                room[start + len(moved) : stop] = 0
            self._spans[text] = start, stop
            start = stop

    def forget(self, text: int) -> None:
        """Its rows are another's."""
        del self._spans[text]
        if not self._spans:
            self._layers.clear()
            self._rows = 0

    def start(self, text: int) -> int:
        """Its first row."""
        return self._spans[text][0]

    def write(self, layer: int, rows: Tensor, keys_values: Tensor) -> Tensor:
        """keys_values [n, ng, 2, d] to rows [n] -> everything that is kept of the layer, [rows, ng, 2, d]."""
        room = self._layers.get(layer)
        if room is None or len(room) < self._rows:
            grown = keys_values.new_zeros(self._rows, *keys_values.shape[1:])
            if room is not None:
                grown[: len(room)] = room
            room = self._layers[layer] = grown
        return room.index_copy_(0, rows, keys_values)


@dataclass(frozen=True)
class KeptText:
    """A text of which some tokens are computed."""

    computed: int
    """Tokens."""
    length: int
    """Tokens that it has."""
    start: int
    """Its first row in `KeptKeys`."""


@dataclass(frozen=True)
class KeptPass:
    """What the attention of every layer is told of a pass. Its tokens are, in this order, those of texts of which
    nothing is kept, those of texts that are kept and computed as a whole, and what is computed of others."""

    whole: "Segments"
    """The texts that are computed as a whole: they are attended to as without this."""
    parts: Sequence[KeptText]
    """The others; those of the same shape beside each other are one call."""
    keys: KeptKeys
    positions: Tensor
    """[k] of the tokens that are kept in their texts, on the device."""
    rows: Tensor
    """[k] of these in `keys`, on the device."""

    def attend(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        """qkv [t, ng, r + 2, d], cos and sin [n, d / 2] -> [t, ng * r, d]; as `segment_attention` otherwise."""
        found, of_whole = [], sum(self.whole.lengths)
        if of_whole:
            segments = self.whole.cu_seqlens_q, scale, self.whole.lengths
            found.append(segment_attention(qkv[:of_whole], cos, sin, *segments))
        kept, parts = qkv[-len(self.rows) :], qkv[of_whole:]
        cos, sin = (table[self.positions][:, None, None] for table in (cos, sin))
        own = torch.cat((rotate(kept[:, :, -2:-1], cos, sin), kept[:, :, -1:]), dim=2)
        room = self.keys.write(layer, self.rows, own)
        if self.parts:
            queries = rotate(parts[:, :, :-2], cos[-len(parts) :], sin[-len(parts) :]).flatten(1, 2)
            found += self._attended(queries, room, scale)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _attended(self, queries: Tensor, room: Tensor, scale: float) -> Iterator[Tensor]:
        """Of each run of `parts` of the same shape: queries [c, ng * r, d] over what is kept, [c, ng * r, d]."""
        first = 0
        for (computed, length), run in groupby(self.parts, key=lambda text: (text.computed, text.length)):
            texts = [room[text.start : text.start + length] for text in run]
            together = torch.stack(texts) if len(texts) > 1 else texts[0][None]
            q = queries[first : first + len(texts) * computed].unflatten(0, (len(texts), computed)).transpose(1, 2)
            k, v = (x.transpose(1, 2) for x in together.unbind(3))
            out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            yield out.transpose(1, 2).flatten(0, 1)
            first += len(texts) * computed

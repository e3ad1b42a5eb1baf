"""Attention of some of a text's tokens over all of it: keys and values of the others are those of an earlier pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.ops.segment_attention import rotate, segment_attention

if TYPE_CHECKING:
    from illada_megatron.model.packing import Segments


class KeptKeys:
    """Keys, turned by their positions, and values of a text, in every layer of this rank. Room is made where a layer
    first writes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: dict[int, Tensor] = {}

    def write(self, layer: int, positions: Tensor | None, keys_values: Tensor) -> Tensor:
        """keys_values [n, ng, 2, d] at positions [n] (None: 0, 1, ...) -> the whole room's, [capacity, ng, 2, d]."""
        room = self._layers.get(layer)
        if room is None:
            # zeros: a position that no pass has computed would be NaN by chance
            room = self._layers[layer] = keys_values.new_zeros(self.capacity, *keys_values.shape[1:])
        if positions is None:
            room[: len(keys_values)] = keys_values
        else:
            room.index_copy_(0, positions, keys_values)
        return room


@dataclass(frozen=True)
class KeptText:
    """A text's share of a pass."""

    rows: int
    """That are computed."""
    positions: Tensor | None
    """[rows] of them in the text, on the device; None: 0, 1, ..."""
    kept: KeptKeys
    length: int
    """Of the text."""


@dataclass(frozen=True)
class KeptPass:
    """What the attention of every layer is told of a pass."""

    whole: "Segments"
    """Texts of which nothing is kept; their rows come first, and are attended to as without this."""
    texts: Sequence[KeptText]
    positions: Tensor
    """[t] of every other row in its text, on the device."""

    def attend(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        """qkv [t, ng, r + 2, d], cos and sin [n, d / 2] -> [t, ng * r, d]; as `segment_attention` otherwise."""
        found, of_whole = [], sum(self.whole.lengths)
        if of_whole:
            whole, qkv = qkv[:of_whole], qkv[of_whole:]
            found.append(segment_attention(whole, cos, sin, self.whole.cu_seqlens_q, scale, self.whole.lengths))
        turned = rotate(qkv[:, :, :-1], cos[self.positions][:, None, None], sin[self.positions][:, None, None])
        queries = turned[:, :, :-1].flatten(1, 2)
        keys_values = torch.stack((turned[:, :, -1], qkv[:, :, -1]), dim=2)
        rows = [text.rows for text in self.texts]
        for text, q, own in zip(self.texts, queries.split(rows), keys_values.split(rows), strict=True):
            everybodys = text.kept.write(layer, text.positions, own)[: text.length]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, *everybodys.unbind(2)))
            out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            found.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(found)

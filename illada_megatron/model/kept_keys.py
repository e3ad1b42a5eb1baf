"""Attention of some of a text's tokens over all of it: keys and values of the others are those of an earlier pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.ops.segment_attention import rotate


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
    kept: KeptKeys | None
    """None: the rows are the whole text, and nothing is kept of them."""
    length: int
    """Of the text."""


@dataclass(frozen=True)
class KeptPass:
    """What the attention of every layer is told of a pass."""

    texts: Sequence[KeptText]
    positions: Tensor
    """[t] of every row in its text, on the device."""

    def attend(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        """qkv [t, ng, r + 2, d], cos and sin [n, d / 2] -> [t, ng * r, d]; as `segment_attention` otherwise."""
        turned = rotate(qkv[:, :, :-1], cos[self.positions][:, None, None], sin[self.positions][:, None, None])
        queries = turned[:, :, :-1].flatten(1, 2)
        keys_values = torch.stack((turned[:, :, -1], qkv[:, :, -1]), dim=2)
        rows = [text.rows for text in self.texts]
        found = []
        for text, q, own in zip(self.texts, queries.split(rows), keys_values.split(rows), strict=True):
            whole = own if text.kept is None else text.kept.write(layer, text.positions, own)[: text.length]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, *whole.unbind(2)))
            out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            found.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(found)

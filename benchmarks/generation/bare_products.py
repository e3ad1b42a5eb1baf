"""The yardstick: the matrix products of a block's steps and nothing else, into buffers that exist already."""

import torch

from benchmarks.generation.shapes import Shape
from benchmarks.measuring.products import LinearProducts


class BareProducts:
    """Of the one prompt. cached: all tokens in the block's first step, the block's in the others."""

    def __init__(self, shape: Shape, cached: bool) -> None:
        work, like = shape.model, torch.empty(0)
        hidden, heads = work.hidden_size, work.num_attention_heads
        dim = hidden // heads
        qkv = dim * (heads + 2 * work.num_query_groups)
        widths = [(hidden, qkv), (heads * dim, hidden), (hidden, 2 * work.ffn_hidden_size)]
        widths.append((work.ffn_hidden_size, hidden))
        self._layers = range(work.num_layers)
        self._linears = [LinearProducts(work.num_layers, shape.tokens, *width, like) for width in widths]
        self._head = LinearProducts(1, shape.block_length, hidden, work.vocab_size, like)
        later = shape.block_length if cached else shape.tokens
        self._steps = [(later if number else shape.tokens, masked) for number, masked in enumerate(shape.masked)]
        self._attention = {rows: _Attention(heads, rows, shape.tokens, dim) for rows, _ in self._steps}

    def warm_up(self) -> None:
        """A step."""
        self._step(*self._steps[0])

    def block(self) -> None:
        """All steps of a block."""
        for computed, masked in self._steps:
            self._step(computed, masked)

    def texts(self) -> list[list[int]]:
        """None: nothing is generated."""
        return []

    @torch.no_grad()
    def _step(self, computed: int, masked: int) -> None:
        for layer in self._layers:
            self._attention[computed].forward()
            for linear in self._linears:
                linear.forward(layer, computed)
        self._head.forward(rows=masked)


class _Attention:
    """q k^T and p v for `heads` matrices: of `rows` queries, and all keys and values."""

    def __init__(self, heads: int, rows: int, tokens: int, dim: int) -> None:
        self.q, self.k, self.v = (torch.randn(heads, length, dim) for length in (rows, tokens, tokens))
        self.p = torch.randn(heads, rows, tokens)
        self.scores, self.out = torch.empty_like(self.p), torch.empty_like(self.q)

    def forward(self) -> None:
        torch.bmm(self.q, self.k.mT, out=self.scores)
        torch.bmm(self.p, self.v, out=self.out)

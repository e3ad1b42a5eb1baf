"""Matrix products into buffers that exist already: what no implementation of a layer or a loss gets around."""

import torch
from torch import Tensor


class LinearProducts:
    """y = x W^T, dx = dy W and dW = dy^T x for up to `rows` rows; dy is what y holds, as where a loss turns logits into
    their gradient. Every layer has a weight of its own, the other buffers are shared.

    like: has the dtype and the device.
    """

    def __init__(self, layers: int, rows: int, inputs: int, outputs: int, like: Tensor) -> None:
        self.weights = like.new_empty(layers, outputs, inputs).normal_()
        self.x, self.dx = like.new_empty(rows, inputs).normal_(), like.new_empty(rows, inputs)
        self.y = like.new_empty(rows, outputs).normal_()
        self.dw = like.new_empty(outputs, inputs)

    def forward(self, layer: int = 0, rows: int | None = None) -> None:
        """rows: of the first that many."""
        torch.mm(self.x[:rows], self.weights[layer].t(), out=self.y[:rows])

    def backward(self, layer: int = 0, rows: int | None = None) -> None:
        torch.mm(self.y[:rows], self.weights[layer], out=self.dx[:rows])
        torch.mm(self.y[:rows].t(), self.x[:rows], out=self.dw)


class AttentionProducts:
    """q k^T and p v for `heads` matrices [s, d], and the four products of their backward pass."""

    def __init__(self, heads: int, length: int, dim: int, like: Tensor) -> None:
        self.q, self.k, self.v, self.d_out = (like.new_empty(heads, length, dim).normal_() for _ in range(4))
        self.dq, self.dk, self.dv, self.out = (like.new_empty(heads, length, dim) for _ in range(4))
        self.p, self.ds = (like.new_empty(heads, length, length).normal_() for _ in range(2))
        self.scores, self.dp = (like.new_empty(heads, length, length) for _ in range(2))

    def forward(self) -> None:
        torch.bmm(self.q, self.k.mT, out=self.scores)
        torch.bmm(self.p, self.v, out=self.out)

    def backward(self) -> None:
        torch.bmm(self.p.mT, self.d_out, out=self.dv)
        torch.bmm(self.d_out, self.v.mT, out=self.dp)
        torch.bmm(self.ds, self.k, out=self.dq)
        torch.bmm(self.ds.mT, self.q, out=self.dk)

"""The embedding of tokens, whose gradient goes row by row to where megatron-core sums gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from illada_megatron.model.main_grad import hand_over


class Embedding(MegatronModule):
    """Tokens `[1, t]` -> hidden states `[t (/ tp with sequence parallelism), 1, h]`.

    A micro-batch meets a few thousand rows of the table. Their gradients are added to its fp32 `main_grad`, where DDP
    keeps one: autograd would make a dense gradient of the whole table first, in a vocabulary of 155,136 a twentieth of
    the step's time and 430 MB on a CPU.
    """

    def __init__(self, config: TransformerConfig, padded_vocab_size: int) -> None:
        super().__init__(config=config)
        self.word_embeddings = _Table(
            num_embeddings=padded_vocab_size,
            embedding_dim=config.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
        )

    def forward(self, tokens: Tensor, only_user: bool) -> Tensor:
        """tokens: `[1, t]` int64. only_user: nobody else's gradient of the table comes through autograd (where they are
        tied, the head's)."""
        hidden = self.word_embeddings(tokens.squeeze(0), only_user).unsqueeze(1)
        group = self.word_embeddings.tp_group
        if self.config.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden, group=group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(hidden, group=group)


class _Table(tensor_parallel.VocabParallelEmbedding):
    """This rank's rows of the table. Called as a module: DDP's hooks wait for weights that are still being gathered."""

    def forward(self, ids: Tensor, only_user: bool) -> Tensor:
        """ids `[t]` of the whole vocabulary -> `[t, h]`, zeros for those of other ranks."""
        cut = self.tp_group.size() > 1
        if cut:
            ids = ids - self.vocab_start_index
            elsewhere = (ids < 0) | (ids >= self.weight.shape[0])
            ids = ids.masked_fill(elsewhere, 0)
        if torch.is_grad_enabled() and getattr(self.weight, "main_grad", None) is not None:
            rows = _Rows.apply(self.weight, ids, only_user)
        else:
            rows = F.embedding(ids, self.weight)
        return rows.masked_fill(elsewhere.unsqueeze(1), 0) if cut else rows


class _Rows(torch.autograd.Function):
    """Rows `ids` `[t]` of the table `[v/tp, h]`; their gradients are added to its main_grad, in order."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, only_user: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table, ctx.only_user = table, only_user
        return F.embedding(ids, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        (ids,) = ctx.saved_tensors
        total, gradient = ctx.table.main_grad, gradient.to(ctx.table.main_grad.dtype)
        # the same sums each time: on a CPU index_add_ is sequential, on a GPU index_put_ sorts the ids first
        if total.is_cuda:
            total.index_put_((ids,), gradient, accumulate=True)
        else:
            total.index_add_(0, ids, gradient)
        if ctx.only_user:
            return hand_over(ctx.table), None, None
        ctx.table.grad_added_to_main_grad = False  # another's gradient comes, and is not: an earlier one may have been
        return None, None, None

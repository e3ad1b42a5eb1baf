"""The embedding of tokens, whose gradient goes row by row to where megatron-core sums gradients."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from illada_megatron.config import ModelConfig
from illada_megatron.model.main_grad import hand_over


@dataclass(frozen=True)
class TokenRows:
    """Which tokens of a micro-batch, `[t]` of them, change which of this rank's rows of the table.

    About half of the tokens are the mask, and adding that many gradients to one row one after the other is the slowest
    way to sum them; with the table cut over tensor-parallel ranks, most of the others are no rank's own.
    """

    positions: Tensor  # [k] int64, of the tokens whose rows are here; masks are not among them
    rows: Tensor  # [k] int64, their rows
    masks: Tensor  # [m] int64, positions of masks; none where their row is another rank's
    mask_row: int

    @classmethod
    def locate(cls, tokens: Tensor, held: range, mask_token_id: int) -> "TokenRows":
        """tokens `[t]` int64; held: the ids whose rows are here. A GPU's tokens make the host wait for it; a loader has
        them on the CPU."""
        is_mask = tokens == mask_token_id
        here = (tokens >= held.start) & (tokens < held.stop)
        positions = (here & ~is_mask).nonzero().flatten()
        masks = (here & is_mask).nonzero().flatten()
        return cls(positions, tokens.index_select(0, positions) - held.start, masks, mask_token_id - held.start)


class Embedding(MegatronModule):
    """Tokens `[1, t]` -> hidden states `[t (/ tp with sequence parallelism), 1, h]`.

    A micro-batch meets a few thousand rows of the table. Their gradients are added to its fp32 `main_grad`, where DDP
    keeps one: autograd would make a dense gradient of the whole table first, in a vocabulary of 155,136 a twentieth of
    the step's time and 430 MB on a CPU.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig) -> None:
        super().__init__(config=config)
        self.word_embeddings = _Table(
            num_embeddings=model.padded_vocab_size,
            embedding_dim=config.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
        )
        self.word_embeddings.mask_token_id = model.mask_token_id

    def forward(self, tokens: Tensor, only_user: bool, token_rows: TokenRows | None = None) -> Tensor:
        """tokens: `[1, t]` int64. only_user: nobody else's gradient of the table comes through autograd (where they are
        tied, the head's). token_rows: of these tokens and this rank; None: they are looked for here."""
        hidden = self.word_embeddings(tokens.squeeze(0), only_user, token_rows).unsqueeze(1)
        group = self.word_embeddings.tp_group
        if self.config.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden, group=group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(hidden, group=group)


class _Table(tensor_parallel.VocabParallelEmbedding):
    """This rank's rows of the table. Called as a module: DDP's hooks wait for weights that are still being gathered."""

    mask_token_id: int

    def forward(self, ids: Tensor, only_user: bool, token_rows: TokenRows | None) -> Tensor:
        """ids `[t]` of the whole vocabulary -> `[t, h]`, zeros for those of other ranks."""
        held = range(self.vocab_start_index, self.vocab_start_index + self.weight.shape[0])
        here = ids - held.start
        elsewhere = (here < 0) | (here >= len(held)) if self.tp_group.size() > 1 else None
        here = here if elsewhere is None else here.masked_fill(elsewhere, 0)
        if torch.is_grad_enabled() and getattr(self.weight, "main_grad", None) is not None:
            found = TokenRows.locate(ids, held, self.mask_token_id) if token_rows is None else token_rows
            return _Rows.apply(self.weight, here, elsewhere, found, only_user)
        rows = F.embedding(here, self.weight)
        return rows if elsewhere is None else rows.masked_fill(elsewhere.unsqueeze(1), 0)


class _Rows(torch.autograd.Function):
    """Rows `here` `[t]` of the table `[v/tp, h]`, zeros at `elsewhere` `[t]`; their gradients are added to its
    main_grad, in order."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, here: Tensor, elsewhere: Tensor | None, token_rows: TokenRows, only_user: bool
    ) -> Tensor:
        ctx.table, ctx.token_rows, ctx.only_user = table, token_rows, only_user
        rows = F.embedding(here, table)
        return rows if elsewhere is None else rows.masked_fill_(elsewhere.unsqueeze(1), 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        total, of = ctx.table.main_grad, ctx.token_rows
        single = gradient.index_select(0, of.positions).to(total.dtype)
        # the same sums each time: on a CPU index_add_ is sequential, on a GPU index_put_ sorts the ids first
        if total.is_cuda:
            total.index_put_((of.rows,), single, accumulate=True)
        else:
            total.index_add_(0, of.rows, single)
        if of.masks.numel() > 0:
            total[of.mask_row] += gradient.index_select(0, of.masks).sum(0, dtype=total.dtype)
        if ctx.only_user:
            return hand_over(ctx.table), None, None, None, None
        ctx.table.grad_added_to_main_grad = False  # another's gradient comes, and is not: an earlier one may have been
        return None, None, None, None, None

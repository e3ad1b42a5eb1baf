"""A batch divided over context-parallel ranks: each token once, where rotary embedding and attention expect it."""

import numpy as np
import pytest
import torch

from illada_megatron.diffusion import MaskedBatch
from illada_megatron.diffusion.context import ContextShare, context_share


def _batch(lengths: list[int]) -> MaskedBatch:
    """One sample of these segments, every token another one."""
    total = sum(lengths)
    tokens = torch.arange(100, 100 + total).view(1, -1)
    return MaskedBatch(
        tokens=tokens,
        labels=tokens + 1000,
        loss_weight=torch.arange(1.0, total + 1).view(1, -1),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        t=torch.zeros(1),
        sample_index=torch.zeros(1, dtype=torch.int64),
    )


def _shares(lengths: list[int], ranks: int, row_tokens: int | None = None, multiple: int = 1) -> list[ContextShare]:
    batch = _batch(lengths)
    return [context_share(batch.cu_seqlens, batch, rank, ranks, row_tokens, multiple) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[24], [1, 23], [5, 1, 1, 30], [12, 12]], ids=str)
def test_each_token_is_one_ranks(ranks: int, lengths: list[int]) -> None:
    """With its label and weight; padding has no weight."""
    batch, shares = _batch(lengths), _shares(lengths, ranks)
    held = torch.cat([share.positions[share.positions >= 0] for share in shares])
    assert sorted(held.tolist()) == list(range(sum(lengths)))
    for share in shares:
        real = share.positions >= 0
        for mine, whole in ((share.tokens, batch.tokens), (share.labels, batch.labels)):
            assert torch.equal(mine[real], whole.view(-1)[share.positions[real]])
        assert torch.equal(share.loss_weight[real], batch.loss_weight.view(-1)[share.positions[real]])
        assert not share.loss_weight[~real].any()
        assert share.loss_weight.dtype == torch.float32
        assert len(share.positions) * ranks == share.cu_seqlens_padded[-1]


@pytest.mark.parametrize("row_tokens", [None, 96])
def test_chunks_are_where_megatron_core_turns_them(row_tokens: int | None) -> None:
    """Angles that megatron-core's rotary embedding gives a rank's tokens of a packed segment, by their places."""
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    ranks, lengths = 3, [17, 4, 30]
    for rank, share in enumerate(_shares(lengths, ranks, row_tokens)):
        begin, first = 0, 0
        for length, padded in zip(lengths, share.cu_seqlens_padded.diff().tolist(), strict=True):
            own = padded // ranks
            angles = torch.arange(padded).view(-1, 1, 1, 1)
            turned = _get_thd_freqs_on_this_cp_rank(rank, ranks, torch.empty(own, 1, 1), angles).flatten()
            within = share.positions[begin : begin + own] - first
            expected = torch.where(turned < length, turned, -1 - first)
            assert torch.equal(within, expected)
            begin, first = begin + own, first + length
        assert share.max_seqlen == share.cu_seqlens_padded.diff().max()


def test_length_of_the_row() -> None:
    """Every segment is a multiple of 2 * ranks; the last one has the rest."""
    for multiple, total in ((8, 32), (48, 48)):
        (share, _) = _shares([5, 21], 2, None, multiple)
        assert share.cu_seqlens_padded.tolist() == [0, 8, total]
    with pytest.raises(ValueError, match="2 segments take 32 tokens when each is padded to a multiple of 4, expected"):
        _shares([5, 21], 2, 28)


def test_a_middle_stage_has_places_alone() -> None:
    batch = _batch([5, 7])
    (whole, _), middle = _shares([5, 7], 2), context_share(batch.cu_seqlens, None, 0, 2, None, 4)
    assert torch.equal(middle.positions, whole.positions)
    assert middle.tokens.numel() == middle.loss_weight.numel() == 0

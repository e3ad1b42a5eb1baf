"""A token whose logit is minus infinity: the loss and gradients of a head that lacks its row, in every implementation,
wherever the row lies, over a cut vocabulary too."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

from illada_megatron.ops import masked_linear_cross_entropy

N, H, VOCAB, PADDED = 70, 24, 301, 320
SOFTCAP, Z_LOSS = 4.0, 1e-2
PLACES = (0, 5, 150, VOCAB - 1)


def problem(dtype: torch.dtype, excluded: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(7)
    hidden = torch.randn(N, H, generator=gen, dtype=torch.float64)
    weight = torch.randn(PADDED, H, generator=gen, dtype=torch.float64)
    weight[excluded] = 3 * hidden.mean(0) * H  # were it in the softmax it would be seen
    labels = torch.randint(0, VOCAB - 1, (N,), generator=gen)
    labels += labels >= excluded
    return hidden.to(dtype), weight.to(dtype), labels, (torch.rand(N, generator=gen) < 0.5) * 3.0


def textbook(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor, excluded: int) -> Tensor:
    logits = SOFTCAP * torch.tanh(hidden @ weight[:VOCAB].T / SOFTCAP)
    logits = logits.index_fill(1, torch.tensor(excluded), -torch.inf)
    losses = F.cross_entropy(logits, labels, reduction="none") + Z_LOSS * logits.logsumexp(1).square()
    return (losses * loss_weight).sum()


def solve(dtype: torch.dtype, excluded: int, implementation: str = "auto", group=None, memory=None):
    hidden, weight, labels, loss_weight = problem(dtype, excluded)
    if group is not None:
        weight = weight.chunk(group.size())[group.rank()].clone()
    loss = masked_linear_cross_entropy(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels,
        loss_weight,
        vocab_size=VOCAB,
        tp_group=group,
        implementation=implementation,
        chunk_memory_bytes=memory,
        z_loss=Z_LOSS,
        logit_softcap=SOFTCAP,
        excluded_id=excluded,
    ).loss_sum
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def exact(dtype: torch.dtype, excluded: int):
    hidden, weight, labels, loss_weight = problem(dtype, excluded)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = textbook(hidden, weight, labels, loss_weight, excluded)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("excluded", PLACES)
@pytest.mark.parametrize(
    ("dtype", "implementation", "tolerance"),
    [
        (torch.float64, "reference", 1e-12),
        (torch.float32, "reference", 1e-5),
        (torch.float32, "fused", 1e-5),
        (torch.bfloat16, "reference", 2e-2),
        (torch.bfloat16, "fused", 2e-2),
        (torch.float16, "fused", 3e-3),
    ],
    ids=str,
)
def test_equals_a_head_without_the_row(dtype, implementation, tolerance, excluded):
    """In one chunk and in several: the mask has no probability, and its row of the head no gradient."""
    wanted = exact(dtype, excluded)
    for memory in (None, 32 * PADDED * 8):
        found = solve(dtype, excluded, implementation, memory=memory)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
        assert not found[2][excluded].any()
        assert not found[2][VOCAB:].any()
    hidden, weight, labels, loss_weight = problem(torch.float64, excluded)
    kept = masked_linear_cross_entropy(hidden, weight, labels, loss_weight, vocab_size=VOCAB, logit_softcap=SOFTCAP)
    assert (kept.loss_sum - wanted[0]).abs() > 0.01 * wanted[0], "the row would not have been noticed"


def test_main_grad():
    hidden, weight, labels, loss_weight = problem(torch.float32, 5)
    main_grad = torch.zeros_like(weight)
    options = {"vocab_size": VOCAB, "z_loss": Z_LOSS, "logit_softcap": SOFTCAP, "excluded_id": 5}
    loss = masked_linear_cross_entropy(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels,
        loss_weight,
        **options,
        main_grad=main_grad,
        grad_scale=1,
    ).loss_sum
    loss.backward()
    for found, wanted in zip((loss.detach(), hidden.grad, main_grad), exact(torch.float32, 5), strict=True):
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()


def test_it_is_no_label():
    hidden, weight, labels, loss_weight = problem(torch.float32, 5)
    labels[int(loss_weight.argmax())] = 5
    with pytest.raises(ValueError, match=r"label 5 of token \d+ is outside the vocabulary \[0, 301\) without 5"):
        masked_linear_cross_entropy(hidden, weight, labels, loss_weight, vocab_size=VOCAB, excluded_id=5)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {(dtype, id): solve(dtype, id, group=dist.group.WORLD) for dtype in TP_DTYPES for id in PLACES}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


TP_DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def test_over_a_cut_vocabulary(tmp_path: Path):
    """One rank holds the row, the other none: the softmax is over the same tokens on both."""
    run_ranks(worker, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (dtype, excluded), (loss, grad_hidden, _) in ranks[0].items():
        wanted = exact(dtype, excluded)
        parts = [one[dtype, excluded] for one in ranks]
        assert torch.equal(parts[1][0], loss)
        grad_weight = torch.cat([part[2] for part in parts])
        for ours, theirs in zip((loss, grad_hidden, grad_weight), wanted, strict=True):
            assert (ours.double() - theirs).norm() <= TP_DTYPES[dtype] * theirs.norm()
        assert not grad_weight[excluded].any()

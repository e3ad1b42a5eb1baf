"""The masked loss over real gloo processes: cut over the vocabulary, hidden whole or cut along the tokens, it must be
the loss and the gradients of one process."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from illada_megatron.ops import masked_linear_cross_entropy

N, H, VOCAB, PADDED = 32, 12, 50, 64  # at tp 4 each rank has 16 rows: the last has 2 real ones
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # and the tolerance
CASES = ("scattered", "none", "all", "first slice only", "one row")


def problem(case: str, dtype: torch.dtype):
    gen = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, H, generator=gen, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, H, generator=gen, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCAB, (N,), generator=gen)
    labels[:2] = torch.tensor([VOCAB - 1, 0])
    scattered = torch.rand(N, generator=gen) < 0.4
    where = {
        "scattered": scattered,
        "none": torch.zeros(N, dtype=torch.bool),
        "all": torch.ones(N, dtype=torch.bool),
        "first slice only": torch.arange(N) < N // 8,
        "one row": torch.arange(N) == N - 1,
    }[case]
    return hidden, weight, labels, where / (0.2 + torch.rand(N, generator=gen))


def solve(case, dtype, group=None, sequence_parallel=False):
    """Loss, per-row CE and this rank's gradients. Upstream scales the loss, as a gradient scaler would."""
    hidden, weight, labels, loss_weight = problem(case, dtype)
    if group is not None:
        weight = weight.chunk(group.size())[group.rank()].clone()
        if sequence_parallel:
            hidden = hidden.chunk(group.size())[group.rank()].clone()
    hidden.requires_grad_()
    weight.requires_grad_()
    result = masked_linear_cross_entropy(
        hidden, weight, labels, loss_weight, vocab_size=VOCAB, tp_group=group, sequence_parallel=sequence_parallel
    )
    (0.5 * result.loss_sum).backward()
    return result.loss_sum.detach(), result.cross_entropy, result.rows, hidden.grad, weight.grad


def worker(rank: int, tp: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=tp)
    results = {}
    for case, sequence_parallel, dtype in itertools.product(CASES, (False, True), DTYPES):
        results[case, sequence_parallel, dtype] = solve(case, dtype, dist.group.WORLD, sequence_parallel)
    results["few rows"] = few_real_rows(dist.group.WORLD)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def few_real_rows(group=None):
    """A vocabulary so small that whole ranks hold only padding."""
    hidden, weight, labels, loss_weight = problem("all", torch.float64)
    weight = weight if group is None else weight.chunk(group.size())[group.rank()].clone()
    hidden.requires_grad_()
    weight.requires_grad_()
    result = masked_linear_cross_entropy(hidden, weight, labels % 9, loss_weight, vocab_size=9, tp_group=group)
    result.loss_sum.backward()
    return result.loss_sum.detach(), hidden.grad, weight.grad


@pytest.fixture(scope="module", params=[2, 4], ids=["tp2", "tp4"])
def ranks(request, tmp_path_factory):
    tp = request.param
    folder = tmp_path_factory.mktemp(f"tp{tp}")
    run_ranks(worker, tp, tp, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(tp)]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence-parallel"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items(), ids=str)
def test_equals_one_process(ranks, case, sequence_parallel, dtype, tolerance):
    loss, cross_entropy, rows, grad_hidden, grad_weight = solve(case, dtype)
    found = [results[case, sequence_parallel, dtype] for results in ranks]
    close = {"rtol": tolerance, "atol": tolerance}
    for rank_loss, rank_cross_entropy, rank_rows, rank_grad_hidden, _ in found:
        assert torch.equal(rank_loss, found[0][0]), "the ranks disagree about the loss"
        torch.testing.assert_close(rank_loss, loss, **close)
        torch.testing.assert_close(rank_cross_entropy, cross_entropy, **close)
        assert torch.equal(rank_rows, rows)
        if not sequence_parallel:
            torch.testing.assert_close(rank_grad_hidden, grad_hidden, **close)
    if sequence_parallel:
        torch.testing.assert_close(torch.cat([each[3] for each in found]), grad_hidden, **close)
    torch.testing.assert_close(torch.cat([each[4] for each in found]), grad_weight, **close)


def test_ranks_that_hold_only_padding(ranks):
    loss, grad_hidden, grad_weight = few_real_rows()
    found = [results["few rows"] for results in ranks]
    for rank_loss, rank_grad_hidden, _ in found:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank_grad_hidden, grad_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([each[2] for each in found]), grad_weight, rtol=1e-12, atol=1e-12)

"""The masked loss on one process: against F.cross_entropy, in fp64, fp32 and bf16."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.ops import logit_passes
from illada_megatron.ops import masked_linear_cross_entropy as op

MASKS = {"none": 0.0, "some": 0.4, "all": 1.0}


def problem(n=24, h=16, vocab=37, padded=48, masked=0.4, dtype=torch.float64, scale=1.0, seed=0):
    """hidden, weight, labels, loss_weight; the padded rows of the head are huge, so that they would show."""
    gen = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, h, generator=gen, dtype=torch.float64) * scale).to(dtype)
    weight = torch.randn(padded, h, generator=gen, dtype=torch.float64)
    weight[vocab:] *= 100
    labels = torch.randint(0, vocab, (n,), generator=gen)
    loss_weight = (torch.rand(n, generator=gen) < masked) / (0.1 + torch.rand(n, generator=gen))
    return hidden.requires_grad_(), weight.to(dtype).requires_grad_(), labels, loss_weight


def naive(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor, vocab: int) -> Tensor:
    """The textbook: all logits, all cross-entropies, most of them multiplied by zero."""
    losses = F.cross_entropy(hidden @ weight[:vocab].T, labels, reduction="none")
    return (losses * loss_weight.to(losses.dtype)).sum()


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("masked", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_cross_entropy_with_gradients(masked, dtype, tolerance):
    hidden, weight, labels, loss_weight = problem(masked=masked, dtype=dtype)
    result = op(hidden, weight, labels, loss_weight, vocab_size=37)
    expected = naive(hidden, weight, labels, loss_weight, 37)

    torch.testing.assert_close(result.loss_sum, expected, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(
        gradients(result.loss_sum, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(result.rows, loss_weight.nonzero().flatten())
    per_row = F.cross_entropy(hidden @ weight[:37].T, labels, reduction="none")[result.rows]
    torch.testing.assert_close(result.cross_entropy, per_row.detach(), rtol=tolerance, atol=tolerance)
    assert not result.cross_entropy.requires_grad


def test_one_masked_row():
    hidden, weight, labels, _ = problem()
    loss_weight = torch.zeros(24)
    loss_weight[7] = 3.0
    result = op(hidden, weight, labels, loss_weight, vocab_size=37)
    (grad,) = gradients(result.loss_sum, hidden)
    assert result.rows.tolist() == [7]
    torch.testing.assert_close(result.loss_sum, 3 * F.cross_entropy(hidden[7] @ weight[:37].T, labels[7]))
    assert grad[7].abs().sum() > 0
    assert grad.abs().sum() == grad[7].abs().sum()


def test_no_masked_row_keeps_the_graph():
    hidden, weight, labels, _ = problem()
    upstream = torch.ones_like(hidden).requires_grad_()
    result = op(hidden * upstream, weight, labels, torch.zeros(24), vocab_size=37)
    result.loss_sum.backward()
    assert result.loss_sum == 0
    assert result.cross_entropy.shape == (0,)
    for tensor in (hidden, weight, upstream):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_gradcheck():
    hidden, weight, labels, loss_weight = problem(n=6, h=5, vocab=7, padded=8, masked=0.7)

    def loss(h, w):
        return 1.7 * op(h, w, labels, loss_weight, vocab_size=7).loss_sum

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_backward_may_run_twice():
    hidden, weight, labels, loss_weight = problem()
    loss = op(hidden, weight, labels, loss_weight, vocab_size=37).loss_sum
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-15, atol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_frozen_input(frozen):
    hidden, weight, labels, loss_weight = problem()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    (found,) = gradients(op(hidden, weight, labels, loss_weight, vocab_size=37).loss_sum, free)
    (wanted,) = gradients(naive(hidden, weight, labels, loss_weight, 37), free)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_no_grad_gives_the_same_loss():
    hidden, weight, labels, loss_weight = problem()
    with_graph = op(hidden, weight, labels, loss_weight, vocab_size=37)
    with torch.no_grad():
        without = op(hidden, weight, labels, loss_weight, vocab_size=37)
    assert not without.loss_sum.requires_grad
    assert torch.equal(with_graph.loss_sum, without.loss_sum)
    assert torch.equal(with_graph.cross_entropy, without.cross_entropy)


def test_padding_does_not_exist():
    """Neither the amount nor the content of the padding changes a bit; its gradient is exactly zero."""
    results = []
    for padded in (37, 48, 64):
        hidden, weight, labels, loss_weight = problem(padded=64)
        head = weight.detach()[:padded].clone()
        head[37:] = torch.nan
        head.requires_grad_()
        loss = op(hidden, head, labels, loss_weight, vocab_size=37).loss_sum
        grad_hidden, grad_head = gradients(loss, hidden, head)
        assert torch.equal(grad_head[37:], torch.zeros(padded - 37, 16, dtype=torch.float64))
        results.append((loss, grad_hidden, grad_head[:37]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unmasked_labels_are_not_read():
    hidden, weight, labels, loss_weight = problem()
    labels[loss_weight == 0] = -100
    assert torch.isfinite(op(hidden, weight, labels, loss_weight, vocab_size=37).loss_sum)


def test_large_logits_do_not_overflow():
    hidden, weight, labels, loss_weight = problem(dtype=torch.float32, scale=1e4)
    result = op(hidden, weight, labels, loss_weight, vocab_size=37)
    grads = gradients(result.loss_sum, hidden, weight)
    assert all(torch.isfinite(tensor).all() for tensor in (result.loss_sum, *grads))


def test_bf16_error_is_no_larger_than_the_naive_losss():
    """Against fp64 on the same bf16 numbers: loss and both gradients, mean over seeds (relative errors)."""
    ours, theirs = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for seed in range(8):
        inputs = problem(n=256, h=64, vocab=500, padded=512, masked=0.5, dtype=torch.bfloat16, scale=0.3, seed=seed)
        hidden, weight, labels, loss_weight = inputs
        result = op(hidden, weight, labels, loss_weight, vocab_size=500)
        assert result.loss_sum.dtype == result.cross_entropy.dtype == torch.float32
        plain = naive(hidden, weight, labels, loss_weight, 500)
        exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        exact = naive(*exact_inputs, labels, loss_weight, 500)
        reference = (exact, *gradients(exact, *exact_inputs))
        for errors, loss in ((ours, result.loss_sum), (theirs, plain)):
            values = (loss, *gradients(loss, hidden, weight))
            assert values[1].dtype == values[2].dtype == torch.bfloat16
            errors += torch.stack(
                [((a.double() - b).norm() / b.norm()) for a, b in zip(values, reference, strict=True)]
            )
    print(
        "\nrelative error against fp64 (loss, d hidden, d weight): ours",
        (ours / 8).tolist(),
        "naive",
        (theirs / 8).tolist(),
    )
    assert (ours <= 1.01 * theirs).all(), f"ours {ours.tolist()}, naive {theirs.tolist()}"


def test_pieces_do_not_change_the_result(monkeypatch):
    hidden, weight, labels, loss_weight = problem()
    whole = op(hidden, weight, labels, loss_weight, vocab_size=37).loss_sum
    monkeypatch.setattr(logit_passes, "_PIECE_ELEMENTS", 3 * 37)  # three rows a piece
    pieces = op(hidden, weight, labels, loss_weight, vocab_size=37).loss_sum
    torch.testing.assert_close(pieces, whole, rtol=1e-14, atol=0)
    for one, two in zip(gradients(whole, hidden, weight), gradients(pieces, hidden, weight), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def changed(**changes):
    hidden, weight, labels, loss_weight = problem()
    inputs = {"hidden": hidden, "weight": weight, "labels": labels, "loss_weight": loss_weight, "vocab_size": 37}
    return inputs | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(24, 8, dtype=torch.float64)}, ValueError, r"\[24, 8\] and \[48, 16\]"),
        ({"hidden": torch.zeros(24, 16)}, TypeError, "float32 and torch.float64"),
        ({"labels": torch.zeros(23, dtype=torch.int64)}, ValueError, r"labels must be \[24\].*found \[23\]"),
        ({"labels": torch.zeros(24, dtype=torch.int32)}, TypeError, "torch.int32"),
        ({"loss_weight": torch.ones(24, dtype=torch.float64)}, TypeError, "torch.float64"),
        ({"loss_weight": torch.ones(24, 1)}, ValueError, r"loss_weight must be \[24\].*found \[24, 1\]"),
        ({"loss_weight": torch.ones(24, device="meta")}, ValueError, "meta"),
        ({"vocab_size": 49}, ValueError, "vocab_size 49.*48 rows on each of 1"),
        (
            {"labels": torch.full((24,), 37), "loss_weight": torch.ones(24)},
            ValueError,
            r"label 37 of token 0 .*\[0, 37\)",
        ),
        ({"labels": torch.full((24,), -1), "loss_weight": torch.ones(24)}, ValueError, "label -1 .*24 such labels"),
    ],
)
def test_errors_name_the_numbers(changes, error, message):
    with pytest.raises(error, match=message):
        op(**changed(**changes))

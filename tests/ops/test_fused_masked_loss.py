"""The compiled passes and the chunk loop: no further from fp64 than the textbook in the same precision, in chunks or
not, and an operator as torch.library wants it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.ops import kernels, loss_operators
from illada_megatron.ops import masked_linear_cross_entropy as op
from illada_megatron.ops.logit_passes import REFERENCE, fused_passes

VOCAB, PADDED = 5003, 5120
MASKS = {
    "half": lambda n: torch.arange(n) % 2 == 0,
    "one": lambda n: torch.arange(n) == 3,
    "all": lambda n: torch.ones(n),
}


def problem(dtype, masked="half", scale=1.0, n=301, h=72):
    gen = torch.Generator().manual_seed(1)
    hidden = (torch.randn(n, h, generator=gen) * scale).to(dtype)
    weight = torch.randn(PADDED, h, generator=gen).to(dtype)
    labels = torch.randint(0, VOCAB, (n,), generator=gen)
    loss_weight = MASKS[masked](n) * torch.logspace(0, 3, n)  # 1 to 1,000
    return hidden, weight, labels, loss_weight.float()


def naive(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor) -> Tensor:
    losses = F.cross_entropy(hidden @ weight[:VOCAB].T, labels, reduction="none")
    return (losses * loss_weight.to(losses.dtype)).sum()


def solve(function, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight)
    loss.backward()
    return [loss.detach().double(), hidden.grad.double(), weight.grad.double()]


@pytest.mark.parametrize("chunk_rows", [1024, 48])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_fp64_than_the_textbook(dtype, scale, masked, chunk_rows):
    if dtype == torch.float16 and scale == 30.0:
        pytest.skip("w (p - 1) exceeds fp16's range for the textbook too")
    hidden, weight, labels, loss_weight = problem(dtype, masked, scale)
    memory = chunk_rows * PADDED * hidden.element_size()
    exact = solve(lambda h, w: naive(h, w, labels, loss_weight), hidden.double(), weight.double())
    textbook = solve(lambda h, w: naive(h, w, labels, loss_weight), hidden, weight)
    ours = solve(
        lambda h, w: (
            op(h, w, labels, loss_weight, vocab_size=VOCAB, implementation="fused", chunk_memory_bytes=memory).loss_sum
        ),
        hidden,
        weight,
    )
    for name, found, plain, wanted in zip(("loss", "hidden", "weight"), ours, textbook, exact, strict=True):
        error, allowed = (found - wanted).norm(), (plain - wanted).norm()
        # tiny: rounding of the order of fp32's sums, and of a single number; fp16 has no product into fp32 on a CPU
        slack = 1.5 if dtype == torch.float16 else 1.05
        tiny = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        limit = slack * allowed + tiny * wanted.norm()
        assert error <= limit, f"{name}: {error:.3e}, the textbook {allowed:.3e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_takes_the_weights_gradient(dtype):
    hidden, weight, labels, loss_weight = problem(dtype)
    _, grad_hidden, grad_weight = solve(
        lambda h, w: 0.25 * op(h, w, labels, loss_weight, vocab_size=VOCAB).loss_sum, hidden, weight
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    main_grad = torch.ones(weight.shape)
    loss = op(hidden, weight, labels, loss_weight, vocab_size=VOCAB, main_grad=main_grad, grad_scale=0.25).loss_sum
    (0.25 * loss).backward()
    assert weight.grad is None
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (hidden.grad.double() - grad_hidden).norm() <= tolerance * grad_hidden.norm()
    assert (main_grad.double() - 1 - grad_weight).norm() <= tolerance * grad_weight.norm()


def test_another_scale_than_promised_is_an_error():
    hidden, weight, labels, loss_weight = problem(torch.float32)
    loss = op(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels,
        loss_weight,
        vocab_size=VOCAB,
        main_grad=torch.zeros(weight.shape),
        grad_scale=0.5,
    ).loss_sum
    with pytest.raises(RuntimeError, match=r"scaled by 0\.5"):
        loss.backward()


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_z_loss_and_softcap(implementation):
    hidden, weight, labels, loss_weight = problem(torch.float32)
    kwargs = {"vocab_size": VOCAB, "z_loss": 1e-2, "logit_softcap": 15.0}

    def textbook(h: Tensor, w: Tensor) -> Tensor:
        logits = 15.0 * torch.tanh(h @ w[:VOCAB].T / 15.0)
        losses = F.cross_entropy(logits, labels, reduction="none") + 1e-2 * logits.logsumexp(1).square()
        return (losses * loss_weight).sum()

    exact = solve(textbook, hidden.double(), weight.double())
    ours = solve(
        lambda h, w: op(h, w, labels, loss_weight, implementation=implementation, **kwargs).loss_sum, hidden, weight
    )
    for found, wanted in zip(ours, exact, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("width", [1, 33, 4097, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_passes_equal_the_reference(dtype, width, softcap):
    """Tails, negative logits under a softcap, a NaN in the first of several blocks, any stride."""
    gen = torch.Generator().manual_seed(0)
    logits = (torch.randn(width, 6, generator=gen) * 20 - 100).to(dtype).T  # column stride 6
    logits[1] = -torch.inf
    logits[2, 0] = torch.nan
    targets = torch.tensor([0, 0, 0, width - 1, width, -1])
    found, wanted = (passes.statistics(logits, targets, softcap) for passes in (fused_passes(), REFERENCE))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    rows = torch.tensor([0, 3, 4, 5])
    values = torch.stack((wanted[0], wanted[1].log(), *torch.rand(2, 6, generator=gen) * 100))[:, rows]
    ours, plain = logits[rows].contiguous(), logits[rows].contiguous()
    fused_passes().to_gradient_(ours, targets[rows], values, softcap)
    REFERENCE.to_gradient_(plain, targets[rows], values, softcap)
    tolerance = {torch.float32: 5e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=1e-6)


def test_the_same_bits_twice():
    hidden, weight, labels, loss_weight = problem(torch.bfloat16)
    first, second = (
        solve(lambda h, w: op(h, w, labels, loss_weight, vocab_size=VOCAB).loss_sum, hidden, weight) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"implementation": "best"}, ValueError, "auto, reference or fused, found 'best'"),
        ({"chunk_memory_bytes": 0}, ValueError, "chunk_memory_bytes must be positive.*found 0"),
        ({"z_loss": -1.0}, ValueError, "z_loss .*found -1.0"),
        ({"logit_softcap": float("inf")}, ValueError, "logit_softcap .*found inf"),
        ({"main_grad": torch.zeros(PADDED, 72)}, ValueError, "main_grad needs grad_scale"),
        ({"main_grad": torch.zeros(PADDED, 72).half(), "grad_scale": 1.0}, TypeError, "float32, found torch.float16"),
        ({"main_grad": torch.zeros(PADDED, 71), "grad_scale": 1.0}, ValueError, r"\[5120, 72\] .*found \[5120, 71\]"),
    ],
)
def test_errors_name_the_numbers(options, error, message):
    hidden, weight, labels, loss_weight = problem(torch.float32)
    with pytest.raises(error, match=message):
        op(hidden, weight, labels, loss_weight, vocab_size=VOCAB, **options)


def test_fused_is_refused_in_fp64():
    hidden, weight, labels, loss_weight = problem(torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        op(hidden, weight, labels, loss_weight, vocab_size=VOCAB, implementation="fused")


def test_mixed_product_is_exact_to_fp32():
    """bf16 factors into an fp32 sum: odd sizes, and a left factor that is a transposed view of a wider matrix."""
    if not kernels.has_mixed_product():
        pytest.skip("this processor has no product of bfloat16 into float32")
    gen = torch.Generator().manual_seed(0)
    for m, k, n in ((5, 3, 7), (130, 33, 64), (300, 600, 40), (257, 1031, 96)):
        for a in (torch.randn(m, k, generator=gen), torch.randn(k, m + 9, generator=gen)[:, :m].T):
            a, b, total = a.bfloat16(), torch.randn(k, n, generator=gen).bfloat16(), torch.randn(m, n, generator=gen)
            expected = total.double() + a.double() @ b.double()
            torch.ops.illada.add_product_(total, a, b)
            torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5 * k**0.5)


def test_opcheck():
    hidden, weight, labels, loss_weight = problem(torch.float32, n=8, h=4)
    args = (hidden.requires_grad_(), weight.requires_grad_(), labels, loss_weight)
    torch.library.opcheck(loss_operators._loss, (*args, VOCAB, 1e-4, 30.0, 10**6, True, None, True))
    logits, row_values = torch.randn(8, 100), torch.rand(4, 8)
    torch.library.opcheck(torch.ops.illada.logit_statistics.default, (logits, labels, 0.0))
    torch.library.opcheck(torch.ops.illada.logits_to_gradient_.default, (logits, labels, row_values, 0.0))

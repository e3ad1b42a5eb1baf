"""The compiled passes and the chunk loop: no further from fp64 than the textbook in the same precision, in chunks or
not, and an operator as torch.library wants it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.ops import kernels, loss_operators
from illada_megatron.ops import masked_linear_cross_entropy as op
from illada_megatron.ops.logit_passes import REFERENCE, fused_passes
from illada_megatron.ops.logit_sweeps import BLOCK_SWEEPS, memory_elements, plain_sweeps

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


@pytest.mark.parametrize("h", [72, 71], ids=["in blocks", "plain"])
@pytest.mark.parametrize("chunk_rows", [1024, 64])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_fp64_than_the_textbook(dtype, scale, masked, chunk_rows, h):
    if dtype == torch.float16 and scale == 30.0:
        pytest.skip("w (p - 1) exceeds fp16's range for the textbook too")
    hidden, weight, labels, loss_weight = problem(dtype, masked, scale, h=h)
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


needs_products = pytest.mark.skipif(not kernels.has_cpu_products(torch.bfloat16), reason="no bf16 products in oneDNN")


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sweeps_in_blocks_leave_nan_in_its_row(dtype):
    """Of odd numbers of ids and columns, where products read pairs."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 30, generator=gen).to(dtype) for n in (33, 769))
    hidden[16] = torch.nan
    targets, memory = torch.arange(33), torch.full((memory_elements(33, 769),), torch.nan, dtype=dtype)
    logits, statistics = BLOCK_SWEEPS.forward(memory, hidden, weight, targets, 0.0)
    assert statistics.isnan().all(0).nonzero().flatten().tolist() == [16]
    values = torch.cat((statistics[:1], statistics[1:2].log(), torch.ones(2, 33))).nan_to_num()
    grad_hidden = torch.empty_like(hidden)
    BLOCK_SWEEPS.backward(logits, hidden, weight, targets, values, 0.0, grad_hidden, torch.ones(769, 30))
    assert grad_hidden.isnan().any(1).nonzero().flatten().tolist() == [16]


@needs_products
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize(("m", "ids", "h"), [(1, 1, 2), (5, 63, 10), (37, 301, 72), (64, 2048, 64), (33, 769, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sweeps_in_blocks_equal_the_plain_ones(dtype, m, ids, h, softcap):
    """Sizes that fill no block, labels held elsewhere, a row of NaN; a sum in fp32 and one in the inputs' dtype."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, h, generator=gen).to(dtype) for n in (m, ids))
    hidden[:1] *= torch.nan if m > 1 else 1  # behind another row, oneDNN's matmul with AMX gives that one NaN too
    targets = torch.randint(-2, ids + 2, (m,), generator=gen)
    scales = torch.rand(2, m, generator=gen) * 100
    results = []
    for sweeps in (BLOCK_SWEEPS, plain_sweeps(REFERENCE)):
        memory = torch.full((memory_elements(m, ids),), torch.nan, dtype=dtype)
        logits, statistics = sweeps.forward(memory, hidden, weight, targets, softcap)
        values = torch.stack((statistics[0], statistics[1].log(), *scales)).nan_to_num(neginf=0.0)
        grad_hidden, sums, rounded = torch.empty_like(hidden), torch.ones(ids, h), torch.ones(ids, h, dtype=dtype)
        for total in (sums, rounded):
            # the plain one overwrites its logits
            sweeps.backward(logits.clone(), hidden, weight, targets, values, softcap, grad_hidden, total)
        results.append((statistics, grad_hidden, sums, rounded))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found.isnan(), wanted.isnan())
        good = wanted.isfinite()
        assert torch.equal(found[~good].nan_to_num(), wanted[~good].nan_to_num())
        error = (found[good].double() - wanted[good].double()).norm()
        assert error <= tolerance * wanted[good].double().norm()


@needs_products
def test_sweeps_refuse_what_does_not_fit():
    hidden, weight, targets = torch.zeros(3, 4), torch.zeros(50, 4), torch.zeros(3, dtype=torch.long)
    logits = torch.zeros(50, 32)
    operator = torch.ops.illada.logits_in_blocks
    for arguments, error, message in (
        ((logits[:, :16], hidden, weight, targets), RuntimeError, r"logits must be \[50, 32\] for 3 rows"),
        ((logits, hidden[:, :3], weight[:, :3], targets), RuntimeError, r"even h, found \[3, 3\] and \[50, 3\]"),
        ((logits, hidden, weight.bfloat16(), targets), TypeError, "of hidden's type, Float, found BFloat16"),
        ((logits, hidden, weight, targets[:2]), RuntimeError, r"targets must be \[3\], found \[2\]"),
        ((logits.half(), hidden.half(), weight.half(), targets), NotImplementedError, "take no Half"),
    ):
        with pytest.raises(error, match=message):
            operator(*arguments, 0.0)
    values = torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match=r"gradients must be .* \[50, 4\], found \[3, 4\] and \[49, 4\]"):
        torch.ops.illada.gradients_in_blocks(
            logits, hidden, weight, targets, values, 0.0, torch.zeros(3, 4), torch.zeros(49, 4)
        )


def test_opcheck():
    hidden, weight, labels, loss_weight = problem(torch.float32, n=8, h=4)
    args = (hidden.requires_grad_(), weight.requires_grad_(), labels, loss_weight)
    torch.library.opcheck(loss_operators._loss, (*args, VOCAB, 1e-4, 30.0, 10**6, True, None, None, True))
    logits, row_values = torch.randn(8, 100), torch.rand(4, 8)
    torch.library.opcheck(torch.ops.illada.logit_statistics.default, (logits, labels, 0.0))
    torch.library.opcheck(torch.ops.illada.logits_to_gradient_.default, (logits, labels, row_values, 0.0))
    if kernels.has_cpu_products(torch.float32):
        logits, hidden, weight = torch.randn(50, 32), torch.randn(8, 4), torch.randn(50, 4)
        shared = (hidden, weight, labels)
        torch.library.opcheck(torch.ops.illada.logits_in_blocks.default, (logits, *shared, 0.0))
        gradients = torch.zeros(8, 4), torch.zeros(50, 4)
        arguments = (logits, *shared, row_values, 0.0, *gradients)
        torch.library.opcheck(torch.ops.illada.gradients_in_blocks.default, arguments)


def test_torch_compile_sees_one_operator():
    """Traced with the code around it, forward and backward, without a graph break: the same loss and gradients.

    aot_eager: inductor asks torch.cuda for the device, which other tests of this process have redirected.
    """
    hidden, weight, labels, loss_weight = problem(torch.float32)
    rows = loss_weight.nonzero().flatten()
    gathered, targets, scale = hidden[rows], labels[rows], loss_weight[rows]

    def loss(h: Tensor, w: Tensor) -> Tensor:
        settings = (VOCAB, 1e-4, 30.0, 10**6, True, None, 5, True)
        return torch.ops.illada.masked_linear_cross_entropy(h * 2, w, targets, scale, *settings)[0] / 3

    compiled = solve(torch.compile(loss, backend="aot_eager", fullgraph=True), gathered, weight)
    for found, wanted in zip(compiled, solve(loss, gathered, weight), strict=True):
        torch.testing.assert_close(found, wanted)

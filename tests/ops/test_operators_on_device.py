"""What a training step computes with, against fp64: on a GPU where there is one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accelerator import DEVICE, ON_GPU, need_kernels
from torch import Tensor

from illada_megatron.ops import masked_linear_cross_entropy
from illada_megatron.ops.add_product import add_product_
from illada_megatron.ops.segment_attention import missing, segment_attention, segment_attention_reference

pytestmark = pytest.mark.gpu
ROWS, HIDDEN, VOCAB = (2048, 1024, 50_003) if ON_GPU else (96, 64, 1003)
PADDED = (VOCAB + 127) // 128 * 128


def _head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels and loss weights of which half are 0, on the device."""
    torch.manual_seed(5)
    hidden, weight = torch.randn(ROWS, HIDDEN), torch.randn(PADDED, HIDDEN)
    loss_weight = torch.logspace(0, 3, ROWS) * (torch.arange(ROWS) % 2 == 0)
    labels = torch.randint(VOCAB, (ROWS,))
    return (
        hidden.to(DEVICE, torch.bfloat16),
        weight.to(DEVICE, torch.bfloat16),
        labels.to(DEVICE),
        loss_weight.float().to(DEVICE),
    )


def _solved(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """The loss, and the gradients of hidden states and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total = loss(hidden, weight)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [total.detach().double(), hidden.grad.double(), weight.grad.double()]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("chunks", [1, 5])
def test_fused_loss_is_no_further_from_fp64_than_the_reference(chunks: int) -> None:
    need_kernels()
    hidden, weight, labels, loss_weight = _head()
    memory = ROWS * PADDED * 2 // chunks

    def ours(implementation: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: (
            masked_linear_cross_entropy(
                x,
                w,
                labels,
                loss_weight,
                vocab_size=VOCAB,
                implementation=implementation,  # type: ignore[arg-type]
                chunk_memory_bytes=memory,
            ).loss_sum
        )

    def textbook(x: Tensor, w: Tensor) -> Tensor:
        return (F.cross_entropy(x @ w[:VOCAB].T, labels, reduction="none") * loss_weight.double()).sum()

    exact = _solved(textbook, hidden.double(), weight.double())
    reference, fused = (_solved(ours(name), hidden, weight) for name in ("reference", "fused"))
    for name, found, other, wanted in zip(("loss", "hidden", "weight"), fused, reference, exact, strict=True):
        assert _error(found, wanted) <= 1.05 * _error(other, wanted) + torch.finfo(torch.bfloat16).eps / 2, name


def test_fused_loss_adds_to_main_grad() -> None:
    need_kernels()
    hidden, weight, labels, loss_weight = _head()

    def loss(x: Tensor, w: Tensor, **main_grad: Tensor | float) -> Tensor:
        return 0.25 * masked_linear_cross_entropy(x, w, labels, loss_weight, vocab_size=VOCAB, **main_grad).loss_sum

    _, grad_hidden, grad_weight = _solved(loss, hidden, weight)
    main_grad = torch.ones(weight.shape, device=DEVICE)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss(hidden, weight, main_grad=main_grad, grad_scale=0.25).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert _error(hidden.grad, grad_hidden) < 1e-2
    assert _error(main_grad - 1, grad_weight) < 1e-2


def test_products_of_bf16_are_added_in_fp32() -> None:
    """Where the sum is also the output: what is in it already stays, to fp32's last bits."""
    torch.manual_seed(6)
    m, k, n = (768, 4096, 512) if ON_GPU else (48, 64, 32)
    a, b = (torch.randn(shape).to(DEVICE, torch.bfloat16) for shape in ((m, k), (k, n)))
    total = 1e4 * torch.randn(m, n).to(DEVICE)
    exact = total.double() + a.double() @ b.double()
    add_product_(total, a, b)
    assert _error(total, exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_of_segments(dtype: torch.dtype) -> None:
    """Output and gradient; lengths that no tile divides, and an empty segment."""
    if not ON_GPU and (reason := missing(DEVICE, dtype)) is not None:
        pytest.skip(reason)
    lengths, groups, heads, dim = ([700, 0, 33, 1315], 2, 4, 128) if ON_GPU else ([20, 0, 13], 1, 2, 16)
    torch.manual_seed(7)
    qkv = torch.randn(sum(lengths), groups, heads + 2, dim).to(DEVICE, dtype)
    grad = torch.randn(sum(lengths), groups * heads, dim).to(DEVICE, dtype)
    angles = torch.outer(torch.arange(max(lengths)), 1e4 ** (-torch.arange(0, dim, 2) / dim))
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    wide = qkv.double().requires_grad_()
    exact = segment_attention_reference(wide, cos.double(), sin.double(), lengths, dim**-0.5)
    exact.backward(grad.double())
    qkv.requires_grad_()
    out = segment_attention(qkv, cos, sin, offsets, dim**-0.5, tuple(lengths))
    out.backward(grad)
    assert wide.grad is not None
    assert qkv.grad is not None
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-4
    assert _error(out.detach(), exact.detach()) < limit
    assert _error(qkv.grad, wide.grad) < limit

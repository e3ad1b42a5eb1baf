"""The compiled attention against float64, and no further from it than torch's scaled_dot_product_attention is."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from illada_megatron.ops.segment_attention import missing, segment_attention, segment_attention_reference

DTYPES = (torch.float32, torch.bfloat16)
# what is left to chance: in float32 both errors are a few roundings
SLACK = {torch.float32: 2.0, torch.bfloat16: 1.02}


def _need(dtype: torch.dtype) -> None:
    if (reason := missing(torch.device("cpu"), dtype)) is not None:
        pytest.skip(reason)


def _angles(length: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length).double(), 1e4 ** (-torch.arange(0, dim, 2).double() / dim))
    return angles.cos().float(), angles.sin().float()


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _with_gradient(function, qkv: Tensor, grad: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    qkv = qkv.clone().requires_grad_()
    cos, sin = (
        table.to(torch.promote_types(qkv.dtype, torch.float32)) for table in _angles(max(lengths), qkv.shape[3])
    )
    segments = lengths if function is segment_attention_reference else _offsets(lengths)
    out = function(qkv, cos, sin, segments, qkv.shape[3] ** -0.5)
    out.backward(grad.to(qkv.dtype))
    assert qkv.grad is not None
    return out.detach(), qkv.grad


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "groups", "heads_per_group", "dim"),
    [
        ([64], 1, 1, 64),
        ([1, 7, 33, 1000], 2, 4, 64),  # odd lengths, longer than a block of queries and of keys
        ([600, 37], 2, 2, 16),
        ([513], 1, 8, 8),  # one key beyond a block
        ([20, 0, 20], 1, 2, 128),  # an empty segment
        ([5, 300], 1, 4, 80),  # a size of a head that no vector divides
        ([3], 1, 1, 2),
        ([2100], 2, 1, 64),
    ],
)
def test_error_against_float64_is_no_larger_than_torch_s(
    dtype: torch.dtype, lengths: list[int], groups: int, heads_per_group: int, dim: int
) -> None:
    _need(dtype)
    torch.manual_seed(1)
    qkv = torch.randn(sum(lengths), groups, heads_per_group + 2, dim).to(dtype)
    grad = torch.randn(sum(lengths), groups * heads_per_group, dim).to(dtype)
    exact = _with_gradient(segment_attention_reference, qkv.double(), grad, lengths)
    torchs = _with_gradient(segment_attention_reference, qkv, grad, lengths)
    ours = _with_gradient(segment_attention, qkv, grad, lengths)
    for name, found, other, target in zip(("out", "grad"), ours, torchs, exact, strict=True):
        assert found.dtype == dtype
        assert _error(found, target) <= SLACK[dtype] * _error(other, target), name
        if dtype == torch.float32:
            assert _error(found, target) < 1e-5, name


def test_large_scores_keep_float32_statistics() -> None:
    """bfloat16 scores would be off by 0.5 here, and their exponentials by a factor."""
    _need(torch.bfloat16)
    torch.manual_seed(2)
    qkv, grad = torch.randn(300, 1, 6, 128).mul(4).bfloat16(), torch.randn(300, 4, 128).bfloat16()
    exact = _with_gradient(segment_attention_reference, qkv.double(), grad, [300])
    ours = _with_gradient(segment_attention, qkv, grad, [300])
    assert _error(ours[0], exact[0]) < 0.02
    assert _error(ours[1], exact[1]) < 0.04


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_s_result_depends_neither_on_the_others_nor_on_threads(dtype: torch.dtype) -> None:
    """Tensor parallelism cuts the groups: a rank has to find what one process finds, bit for bit."""
    _need(dtype)
    torch.manual_seed(3)
    lengths = [70, 700, 5]
    qkv, grad = torch.randn(775, 4, 4, 32).to(dtype), torch.randn(775, 8, 32).to(dtype)
    out, grad_qkv = _with_gradient(segment_attention, qkv, grad, lengths)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        half_out, half_grad = _with_gradient(segment_attention, qkv[:, 2:], grad[:, 4:], lengths)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(out[:, 4:], half_out)
    assert torch.equal(grad_qkv[:, 2:], half_grad)


def test_a_segment_sees_nothing_of_another() -> None:
    _need(torch.bfloat16)
    torch.manual_seed(4)
    qkv = torch.randn(100, 1, 4, 64).bfloat16()
    cos, sin = _angles(60, 64)
    out = segment_attention(qkv, cos, sin, _offsets([60, 40]), 0.125)
    qkv[60:] = float("nan")
    assert torch.equal(segment_attention(qkv, cos, sin, _offsets([60, 40]), 0.125)[:60], out[:60])


def test_a_nan_is_not_hidden() -> None:
    _need(torch.bfloat16)
    qkv = torch.randn(100, 1, 4, 64).bfloat16()
    qkv[50, 0, 2, 3] = float("nan")  # a key
    assert segment_attention(qkv, *_angles(100, 64), _offsets([100]), 0.125).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_is_well_defined(dtype: torch.dtype) -> None:
    """Schema, fake tensors and autograd agree with the kernel: torch.compile and export may rely on it."""
    _need(dtype)
    qkv = torch.randn(40, 2, 4, 16).to(dtype).requires_grad_()
    arguments = (qkv, *_angles(30, 16), _offsets([30, 10]), 0.25)
    torch.library.opcheck(torch.ops.illada.segment_attention.default, arguments)
    out, lse = torch.ops.illada.segment_attention(*arguments)
    arguments = (torch.randn_like(out), qkv, *_angles(30, 16), _offsets([30, 10]), out, lse, 0.25)
    torch.library.opcheck(
        torch.ops.illada.segment_attention_backward.default,
        tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(8, 1, 3, 15)}, RuntimeError, r"an even size of a head\], found \[8, 1, 3, 15\]"),
        ({"qkv": torch.zeros(8, 1, 2, 16)}, RuntimeError, r"found \[8, 1, 2, 16\]"),
        ({"cu": torch.tensor([0, 8])}, TypeError, "cu_seqlens must be int32, found Long"),
        ({"cu": torch.tensor([0, 7]).int()}, ValueError, "lead from 0 to the 8 tokens of qkv, found 0 to 7"),
        ({"cu": torch.tensor([0, 9, 8]).int()}, ValueError, "must not fall, found 9 before 8"),
        ({"cos": torch.zeros(7, 8)}, RuntimeError, r"cos must be \[>= 8, 8\].*found \[7, 8\]"),
        ({"scale": 0.0}, ValueError, "scale must be positive, found 0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    _need(torch.float32)
    given = {"qkv": torch.zeros(8, 1, 3, 16), "cos": torch.zeros(8, 8), "sin": torch.zeros(8, 8)}
    given |= {"cu": torch.tensor([0, 8]).int(), "scale": 1.0} | change  # type: ignore[assignment]
    with pytest.raises(error, match=message):
        segment_attention(*given.values())  # type: ignore[arg-type]


def test_flop_counter_knows_its_products() -> None:
    _need(torch.float32)
    qkv = torch.randn(40, 2, 5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        segment_attention(qkv, *_angles(30, 16), _offsets([30, 10]), 0.25).sum().backward()
    product = 2 * (30**2 + 10**2) * 6 * 16
    assert counter.get_total_flops() == (2 + 5) * product

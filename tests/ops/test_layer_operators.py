"""The compiled RMSNorm and SwiGLU against float64, and no further from it than torch's operators are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from illada_megatron.ops import rms_norm as norm
from illada_megatron.ops import swiglu as activation

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((5, 1, 512), (1, 7), (130, 33), (64, 96), (0, 16))
SLACK = {torch.float32: 2.0, torch.bfloat16: 1.01}

if (reason := norm.missing(torch.device("cpu"), torch.float32)) is not None:
    pytest.skip(reason, allow_module_level=True)


def _with_gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def _compare(dtype: torch.dtype, ours: list[Tensor], torchs: list[Tensor], exact: list[Tensor]) -> None:
    for found, other, target in zip(ours, torchs, exact, strict=True):
        assert found.dtype == dtype
        assert found.shape == target.shape
        error, allowed = ((x.double() - target).norm() for x in (found, other))
        assert error <= SLACK[dtype] * allowed + 1e-6 * target.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x, weight, grad = (torch.randn(size).to(dtype) for size in (shape, shape[-1:], shape))
    ours = _with_gradients(lambda x, w: norm.rms_norm(x, w, 1e-5), grad, x, weight)
    torchs = _with_gradients(lambda x, w: norm.rms_norm_reference(x, w, 1e-5), grad, x, weight)
    exact = _with_gradients(
        lambda x, w: norm.rms_norm_reference(x, w, 1e-5), grad.double(), x.double(), weight.double()
    )
    _compare(dtype, ours, torchs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1, 3584)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    x = (5 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype)
    grad = torch.randn(shape).to(dtype)
    ours = _with_gradients(activation.swiglu, grad, x)
    torchs = _with_gradients(activation.swiglu_reference, grad, x)
    exact = _with_gradients(activation.swiglu_reference, grad.double(), x.double())
    _compare(dtype, ours, torchs, exact)


@pytest.mark.parametrize("gate", [-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4])
def test_swiglu_of_extreme_gates(gate: float) -> None:
    x, grad = torch.tensor([[gate, 3.0]]), torch.ones(1, 1)
    ours, exact = (
        _with_gradients(function, grad, x.to(dtype))
        for function, dtype in ((activation.swiglu, torch.float32), (activation.swiglu_reference, torch.float64))
    )
    for found, target in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), target, atol=1e-30, rtol=1e-5)


def test_sums_do_not_depend_on_threads() -> None:
    """Rows are summed in blocks of a fixed size: a layout with other threads gets the same weight gradient."""
    torch.manual_seed(3)
    x, weight, grad = (torch.randn(size) for size in ((1000, 48), (48,), (1000, 48)))
    ours = _with_gradients(lambda x, w: norm.rms_norm(x, w, 1e-5), grad, x, weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = _with_gradients(lambda x, w: norm.rms_norm(x, w, 1e-5), grad, x, weight)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_are_well_defined(dtype: torch.dtype) -> None:
    """Schema, fake tensors and autograd agree with the kernels."""
    x, weight = (torch.randn(size).to(dtype).requires_grad_() for size in ((4, 3, 32), (32,)))
    torch.library.opcheck(torch.ops.illada.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.illada.swiglu.default, (x,))
    x, weight = x.detach(), weight.detach()
    y, rstd = torch.ops.illada.rms_norm(x, weight, 1e-5)
    torch.library.opcheck(torch.ops.illada.rms_norm_backward.default, (y, x, weight, rstd))
    torch.library.opcheck(torch.ops.illada.swiglu_backward.default, (torch.randn(4, 3, 16).to(dtype), x))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"as long as a row of x, found x \[2, 4\] and weight \[3\]"):
        norm.rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-5)
    with pytest.raises(TypeError, match="weight must be Float as the input, found BFloat16"):
        norm.rms_norm(torch.zeros(2, 4), torch.zeros(4).bfloat16(), 1e-5)
    with pytest.raises(RuntimeError, match=r"x must be \[..., 2 f\].*found \[2, 3\]"):
        activation.swiglu(torch.zeros(2, 3))

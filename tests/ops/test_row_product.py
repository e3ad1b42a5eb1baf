"""The product whose rows do not depend on each other: against float64, bit for bit in any company, on any threads."""

import pytest
import torch
from torch import Tensor

from illada_megatron.ops import kernels
from illada_megatron.ops.row_product import missing, row_product

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
# rows of x: of one vector, of two, of a panel (32), of a group of panels (512) and beyond; several blocks of columns
# (128) and of rows of w (96 or fewer), with rests of all of them
SHAPES = ((1, 1, 1), (3, 7, 5), (8, 64, 128), (17, 1000, 300), (33, 97, 129), (70, 331, 4096), (600, 190, 257))

if (reason := kernels.missing_in_layers("row_product", CPU, torch.float32)) is not None:
    pytest.skip(reason, allow_module_level=True)


def _operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(m * n + k)
    x, w = (torch.randn(rows, k, generator=source).to(dtype) for rows in (m, n))
    return x, w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w = _operands(*shape, dtype)
    expected = x.double() @ w.double().t()
    found = row_product(x, w)
    assert found.dtype == dtype
    exact = 1e-6 if dtype == torch.float32 else 4e-3
    allowed = exact * (x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)) + exact * expected.abs()
    assert bool(((found.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bits_in_any_company(dtype: torch.dtype, threads: int) -> None:
    """Of up to 600 rows; a product of libraries gives others here."""
    x, w = _operands(600, 333, 700, dtype)
    every = row_product(x, w)
    for first, count in ((0, 1), (5, 2), (100, 7), (30, 8), (1, 9), (3, 16), (11, 31), (2, 33), (64, 100), (7, 590)):
        assert torch.equal(row_product(x[first : first + count], w), every[first : first + count])
    assert torch.equal(row_product(x, w[50:61]), every[:, 50:61])


def test_the_threads_change_no_bit() -> None:
    x, w = _operands(40, 1111, 512, torch.float32)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(row_product(x, w))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_strides_and_dimensions_are_followed() -> None:
    x, w = _operands(12, 40, 96, torch.float32)
    plain = row_product(x, w)
    assert torch.equal(row_product(x.view(3, 4, 96), w), plain.view(3, 4, 40))
    assert torch.equal(row_product(x.t().contiguous().t(), w.t().contiguous().t()), plain)
    assert torch.equal(row_product(x[3], w), plain[3])


def test_nan_and_infinity_stay_in_their_rows() -> None:
    x, w = _operands(10, 50, 64, torch.float32)
    plain = row_product(x, w)
    x[4, 7], x[6, 3] = torch.nan, torch.inf
    found = row_product(x, w)
    assert found[4].isnan().all()
    assert not found[6].isfinite().any()
    others = [row for row in range(10) if row not in (4, 6)]
    assert torch.equal(found[others], plain[others])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_is_a_sum_of_nothing(m: int, n: int, k: int) -> None:
    assert torch.equal(row_product(torch.ones(m, k), torch.ones(n, k)), torch.zeros(m, n))


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"expected x \[..., k\] and w \[n, k\], found \[2, 3\] and \[5, 4\]"):
        row_product(torch.ones(2, 3), torch.ones(5, 4))
    with pytest.raises(TypeError, match="one dtype, float32 or bfloat16"):
        row_product(torch.ones(2, 3), torch.ones(5, 3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="one dtype, float32 or bfloat16"):
        row_product(torch.ones(2, 3, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64))


def test_shapes_are_known_without_data() -> None:
    x, w = torch.empty(3, 4, 8, device="meta"), torch.empty(6, 8, device="meta")
    assert torch.ops.illada.row_product(x, w).shape == (3, 4, 6)


def test_where_it_is_used() -> None:
    assert missing(CPU, torch.float32) is None
    assert (missing(CPU, torch.bfloat16) is None) != kernels.has_cpu_products(torch.bfloat16)
    assert missing(torch.device("meta"), torch.float32) == "it is a CPU's"
    assert "found torch.float16" in (missing(CPU, torch.float16) or "")

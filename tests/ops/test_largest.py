"""The largest of each row and the rest of its softmax: against float64, in any company, on any threads; compiled
and of torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from illada_megatron.ops import kernels
from illada_megatron.ops.largest import by_torch, largest

CPU = torch.device("cpu")
WAYS = [by_torch] if kernels.missing("largest", CPU) else [by_torch, largest]
# columns: of less than a vector, of a vector, of blocks (64 or 128) and of what is searched again (1,024) with rests,
# of the published vocabulary
COLUMNS = (1, 3, 16, 63, 64, 129, 1024, 1500, 5000, 155_136)

Way = Callable[[Tensor], tuple[Tensor, Tensor]]
each_way = pytest.mark.parametrize("way", WAYS, ids=["torch", "compiled"][: len(WAYS)])


def _logits(m: int, v: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(m, v, generator=torch.Generator().manual_seed(m + v))


def _expected(logits: Tensor) -> tuple[Tensor, Tensor]:
    index = logits.argmax(-1)
    wide = logits.double()
    others = (wide - wide.gather(1, index[:, None])).exp().scatter(1, index[:, None], 0.0)
    return index, others.sum(-1)


@each_way
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("v", COLUMNS)
def test_against_float64(way: Way, v: int, spread: float) -> None:
    logits = _logits(5, v, spread)
    index, rest = way(logits)
    expected = _expected(logits)
    assert (index.dtype, rest.dtype) == (torch.int64, torch.float64)
    assert torch.equal(index, expected[0])
    # a difference of logits of 30 to 100 is rounded by up to 4e-6
    torch.testing.assert_close(rest, expected[1], rtol=2e-7 if spread < 30 else 4e-6, atol=1e-37)


@each_way
def test_what_is_sure_keeps_its_order(way: Way) -> None:
    """1 - p of 1e-9 to 1e-12: in fp32 all of these are 1."""
    logits = torch.full((40, 3000), -60.0)
    logits[:, 1234] = 0.0
    logits[:, 77] = -torch.linspace(20.7, 27.6, 40)
    _, rest = way(logits)
    assert bool((rest.diff() < 0).all())
    torch.testing.assert_close(rest, _expected(logits)[1], rtol=2e-7, atol=0)


@each_way
def test_a_row_is_the_same_bits_in_any_company(way: Way, threads: int) -> None:
    logits = _logits(70, 9_001)
    index, rest = way(logits)
    for first, count in ((0, 1), (5, 2), (30, 8), (11, 31), (7, 63)):
        some = way(logits[first : first + count].clone())
        assert torch.equal(some[0], index[first : first + count])
        assert torch.equal(some[1], rest[first : first + count])


@each_way
@pytest.mark.parametrize("v", [7, 64, 1100, 4099])
def test_of_equals_the_first(way: Way, v: int) -> None:
    logits = torch.zeros(3, v)
    logits[1, v // 2 :] = 1.0
    logits[2, -1] = 1.0
    assert way(logits)[0].tolist() == [0, v // 2, v - 1]


@each_way
def test_nan_is_larger_than_all_and_stays_in_its_row(way: Way) -> None:
    logits = _logits(6, 2100)
    plain = way(logits)
    logits[1, 1700], logits[1, 2099], logits[2, 2099], logits[4, 5] = torch.nan, torch.nan, torch.nan, torch.inf
    index, rest = way(logits)
    assert index[[1, 2, 4]].tolist() == [1700, 2099, 5]
    assert bool(rest[[1, 2]].isnan().all())
    others = [0, 3, 5]
    assert torch.equal(index[others], plain[0][others])
    assert torch.equal(rest[others], plain[1][others])


@each_way
def test_what_is_excluded_has_no_probability(way: Way) -> None:
    logits = _logits(4, 700)
    logits[:, 300:] = -torch.inf
    logits[3] = -torch.inf
    index, rest = way(logits)
    torch.testing.assert_close(rest[:3], _expected(logits[:3, :300])[1], rtol=2e-7, atol=0)
    assert index[3] == 0
    one = torch.full((1, 200), -torch.inf)
    one[0, 150] = 2.0
    assert [found.item() for found in way(one)] == [150, 0.0]


@each_way
def test_no_rows(way: Way) -> None:
    index, rest = way(torch.empty(0, 50))
    assert index.shape == rest.shape == (0,)
    assert (index.dtype, rest.dtype) == (torch.int64, torch.float64)


def test_other_precisions_and_strides() -> None:
    logits = _logits(4, 333)
    wide = largest(logits.double())
    torch.testing.assert_close(wide[1], _expected(logits.double())[1], rtol=1e-14, atol=0)
    for way in WAYS:
        for found, wanted in zip(way(logits.t().contiguous().t()), way(logits), strict=True):
            assert torch.equal(found, wanted)


def test_few_rows_are_worked_on_at_a_time() -> None:
    """Of 32 rows of the published vocabulary torch's operators would make 20 MB more at each step on the way."""
    sizes: list[int] = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
                sizes.append(found.numel())
            return found

    logits = _logits(32, 155_136)
    with Sizes():
        by_torch(logits)
    assert max(sizes) <= 1 << 18


@pytest.mark.skipif(len(WAYS) == 1, reason="the operator is not built")
def test_the_operator_is_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("illada_megatron.ops.largest.by_torch", None)
    assert largest(_logits(3, 100))[0].shape == (3,)


@pytest.mark.skipif(len(WAYS) == 1, reason="the operator is not built")
def test_what_the_operator_does_not_take() -> None:
    with pytest.raises(RuntimeError, match=r"expected logits \[m, v\], v at least 1, found \[3\]"):
        torch.ops.illada.largest(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"v at least 1, found \[3, 0\]"):
        torch.ops.illada.largest(torch.ones(3, 0))
    with pytest.raises(TypeError, match="expected logits in float32"):
        torch.ops.illada.largest(torch.ones(3, 4, dtype=torch.float64))
    index, rest = torch.ops.illada.largest(torch.empty(3, 4, device="meta"))
    assert (index.shape, rest.dtype) == ((3,), torch.float64)

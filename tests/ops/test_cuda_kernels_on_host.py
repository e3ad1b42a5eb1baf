"""The CUDA kernels of csrc/masked_cross_entropy, run by the CPU machine of tests/simt and compared with fp64.

This proves their logic: indices, alignment, reductions, barriers, special values. It proves neither speed nor memory
ordering on a device, and the host's expf and tanhf stand in for the device's; test_cuda_device.py is for a GPU.
"""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from simt import reference
from simt.harness import FaultError, Layout, LogitMatrix, Machine, machine
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SOFTCAPS = (0.0, 30.0)
# Up to one vector, one warp, several; 4099 and 20011 make a thread of the strided and of the 16-byte path take all its
# loads at once, with a rest
COLUMNS = (0, 1, 7, 31, 32, 33, 255, 1000, 1025, 4099, 20011)
M = 3
OUTSIDE = (-1, -100, 2**40, -(2**63), 2**63 - 1)


@pytest.fixture(scope="module", name="machine")
def compiled_machine() -> Iterator[Machine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the references are small: threads that wait for one another take longer
    yield machine()
    torch.set_num_threads(threads)
    machine().set_order(0)


def layouts(v: int, m: int) -> dict[str, Layout]:
    """Every alignment of a row's start within 16 bytes, rows further apart than they are long, and other strides."""
    return {
        "contiguous": Layout(v),
        "guard before": Layout(v, guard_after=False),
        **{f"misaligned by {k}": Layout(v + 5, offset=k, guard_after=k % 2 == 0) for k in range(1, 8)},
        "every other column": Layout(2 * v + 1, 2, guard_after=False),
        "transposed": Layout(1, m),
        "columns backwards": Layout(v + 3, -1, guard_after=False),
        "rows backwards": Layout(-v - 2, offset=1),
    }


LAYOUTS = tuple(layouts(1, 1))


def random_logits(m: int, v: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with some -inf among them (never a target), and targets: inside, last column, outside, in turn."""
    generator = torch.Generator().manual_seed(seed + v)
    logits = 4 * torch.randn(m, v, generator=generator)
    targets = torch.empty(m, dtype=torch.int64)
    for i in range(m):
        choices = (
            int(torch.randint(max(v, 1), (), generator=generator)),
            v - 1,
            OUTSIDE[(seed + i + v) % len(OUTSIDE)],
        )
        targets[i] = choices[(i + seed) % 3]
    hidden = torch.rand(m, v, generator=generator) < 0.05
    logits[hidden & (torch.arange(v) != targets[:, None])] = -torch.inf
    return logits.to(dtype), targets


def row_values(logits: Tensor, targets: Tensor, softcap: float, seed: int = 0) -> Tensor:
    """Maximum and log of the sum of a softmax, two different scales up to 1,000."""
    generator = torch.Generator().manual_seed(seed)
    maximum, total, _ = reference.statistics(logits.double(), targets, softcap)
    scales = 10 ** (6 * torch.rand(2, logits.shape[0], generator=generator) - 3)
    return torch.stack((maximum, total.log(), *scales)).float()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(machine: Machine, dtype: torch.dtype, softcap: float, layout: str) -> None:
    for v in COLUMNS:
        logits, targets = random_logits(M, v, dtype)
        found = machine.logit_statistics(logits, targets, softcap, layouts(v, M)[layout])
        reference.assert_statistics(found, logits, targets, softcap)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(machine: Machine, dtype: torch.dtype, softcap: float, layout: str) -> None:
    for v in COLUMNS:
        logits, targets = random_logits(M, v, dtype, seed=1)
        rows = row_values(logits, targets, softcap)
        found = machine.logits_to_gradient(logits, targets, rows, softcap, layouts(v, M)[layout])
        reference.assert_gradient(found, logits, targets, rows, softcap)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [33, 4099, 17000])
def test_the_target_may_be_in_any_column(machine: Machine, v: int, dtype: torch.dtype, softcap: float) -> None:
    """First, last, both sides of a row's aligned middle, of a block's width and of a group of loads."""
    edges = {0, 1, v - 1, v - 2, *(e + d for e in (8, 16, 512, 2048, 4096, 16384) for d in (-3, -1, 0, 1, 7))}
    columns = sorted(edges & set(range(v)))
    targets = torch.tensor(columns)
    logits = random_logits(1, v, dtype)[0].expand(len(columns), v).contiguous()
    logits[torch.arange(len(columns)), targets] = 3
    layout = Layout(v, offset=3)
    found = machine.logit_statistics(logits, targets, softcap, layout)
    reference.assert_statistics(found, logits, targets, softcap)
    rows = row_values(logits, targets, softcap)
    gradient = machine.logits_to_gradient(logits, targets, rows, softcap, layout)
    reference.assert_gradient(gradient, logits, targets, rows, softcap)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_vocabulary(machine: Machine, dtype: torch.dtype, softcap: float) -> None:
    """iLLaDA's 155,136 columns. The log of the normalizer errs no more than torch's plain fp32 evaluation, or than
    fp32 rounds it."""
    logits, targets = random_logits(2, 155_136, dtype)
    found = machine.logit_statistics(logits, targets, softcap, Layout(155_136))
    reference.assert_statistics(found, logits, targets, softcap)
    expected, ours, plain = (
        maximum + total.log()
        for maximum, total, _ in (
            reference.statistics(logits.double(), targets, softcap),
            found.double(),
            reference.statistics(logits.float(), targets, softcap).double(),
        )
    )
    assert (ours - expected).abs().max() <= max((plain - expected).abs().max(), 2**-24 * expected.abs().max())
    rows = row_values(logits, targets, softcap)
    gradient = machine.logits_to_gradient(logits, targets, rows, softcap, Layout(155_136))
    reference.assert_gradient(gradient, logits, targets, rows, softcap)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 33, 1025, 17000])
def test_extreme_logits(machine: Machine, v: int, dtype: torch.dtype, softcap: float) -> None:
    """No overflow, and no NaN where there is none: -inf alone, one number among -inf, +-1e4, the largest numbers."""
    generator = torch.Generator().manual_seed(v)
    signs = torch.randint(2, (v,), generator=generator) * 2 - 1
    logits = torch.full((6, v), -torch.inf, dtype=dtype)
    logits[1, v // 2] = -7
    logits[2] = (1e4 * signs).to(dtype)
    logits[3] = torch.finfo(dtype).max * signs.to(dtype)
    logits[4] = -torch.finfo(dtype).max
    logits[5] = torch.finfo(dtype).smallest_normal
    targets = torch.full((6,), v // 2)
    layout = Layout(v, offset=1)
    found = machine.logit_statistics(logits, targets, softcap, layout)
    reference.assert_statistics(found, logits, targets, softcap)
    if softcap == 0:
        assert found[:, 0].tolist() == [-torch.inf, 0, -torch.inf]
    rows = row_values(logits, targets, softcap)
    used = slice(0 if softcap > 0 else 1, None)  # a row of -inf has no normalizer
    logits, targets, rows = logits[used], targets[used], rows[:, used].contiguous()
    gradient = machine.logits_to_gradient(logits, targets, rows, softcap, layout)
    reference.assert_gradient(gradient, logits, targets, rows, softcap)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_not_lost(machine: Machine, dtype: torch.dtype, softcap: float) -> None:
    """In any place of a row, also of a row that holds nothing else or -inf; other rows do not see it."""
    v = 17000
    places = (0, 5, 8, 700, 4096, 16390, v - 1)
    logits = random_logits(len(places) + 3, v, dtype)[0]
    logits[range(len(places)), places] = torch.nan
    logits[-3] = torch.nan
    logits[-2] = -torch.inf
    logits[-2, 9] = torch.nan
    targets = torch.full((logits.shape[0],), 1)
    layout = Layout(v, offset=2)
    found = machine.logit_statistics(logits, targets, softcap, layout)
    assert found[:2, :-1].isnan().all()
    reference.assert_statistics(found[:, -1:], logits[-1:], targets[-1:], softcap)

    rows = torch.tensor([20.0, 0.0, 1.0, 1.0])[:, None].repeat(1, logits.shape[0])
    gradient = machine.logits_to_gradient(logits, targets, rows, softcap, layout)
    reference.assert_gradient(gradient, logits, targets, rows, softcap)
    assert torch.equal(gradient.isnan(), logits.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_told_apart_from_nan(machine: Machine, dtype: torch.dtype) -> None:
    """An overflow of fp16's matrix product: the maximum says so, the sum is NaN as inf - inf is."""
    logits, targets = random_logits(2, 1000, dtype)
    logits[0, 77] = torch.inf
    found = machine.logit_statistics(logits, targets, 0.0, Layout(1000))
    assert found[0, 0] == torch.inf
    assert found[1, 0].isnan()
    reference.assert_statistics(found[:, 1:], logits[1:], targets[1:], 0.0)


def test_a_probability_near_one_keeps_its_gradient(machine: Machine) -> None:
    """scale * (p - 1) with p = 1 - 1e-7 or so: from exp(d) - 1 no digit would be left in fp32."""
    v = 40
    d = -torch.tensor([1e-7, 1e-9, 3e-12, 0.0])
    logits = torch.full((4, v), -100.0)
    logits[:, 11] = d
    targets = torch.full((4,), 11)
    rows = torch.tensor([0.0, 0.0, 1000.0, 1000.0])[:, None].repeat(1, 4)
    gradient = machine.logits_to_gradient(logits, targets, rows, 0.0, Layout(v))
    torch.testing.assert_close(gradient[:, 11].double(), 1000 * d.double().expm1(), rtol=1e-6, atol=0)


def test_scales_of_zero_give_zero(machine: Machine) -> None:
    """A row that this rank weighs with 0 has no gradient, target included."""
    logits, targets = random_logits(M, 1000, torch.bfloat16)
    rows = row_values(logits, targets, 0.0) * torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]
    assert (machine.logits_to_gradient(logits, targets, rows, 0.0, Layout(1000)) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_in_any_order_of_threads(machine: Machine, dtype: torch.dtype) -> None:
    """Nothing depends on which thread runs first: no barrier is missing, no order of summation is left open."""
    logits, targets = random_logits(2, 20011, dtype)
    rows = row_values(logits, targets, 30.0)
    results = []
    for order in (0, 1, 2, 3):
        machine.set_order(order)
        layout = Layout(20011, offset=5)
        found = machine.logit_statistics(logits, targets, 30.0, layout)
        gradient = machine.logits_to_gradient(logits, targets, rows, 30.0, layout)
        results.append((found, gradient.float()))
    machine.set_order(0)
    for found, gradient in results[1:]:
        assert torch.equal(found, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("row_stride", [2**31 + 11, 2**32 + 1])
def test_rows_beyond_2_31_elements(machine: Machine, row_stride: int) -> None:
    logits, targets = random_logits(M, 255, torch.bfloat16)
    layout = Layout(row_stride)
    found = machine.logit_statistics(logits, targets, 0.0, layout)
    reference.assert_statistics(found, logits, targets, 0.0)
    rows = row_values(logits, targets, 0.0)
    gradient = machine.logits_to_gradient(logits, targets, rows, 0.0, layout)
    reference.assert_gradient(gradient, logits, targets, rows, 0.0)


def test_columns_beyond_2_31_elements(machine: Machine) -> None:
    logits, targets = random_logits(1, 4099, torch.bfloat16)
    layout = Layout(1, 2**20)
    found = machine.logit_statistics(logits, targets, 0.0, layout)
    reference.assert_statistics(found, logits, targets, 0.0)
    rows = row_values(logits, targets, 0.0)
    gradient = machine.logits_to_gradient(logits, targets, rows, 0.0, layout)
    reference.assert_gradient(gradient, logits, targets, rows, 0.0)


def test_without_rows_nothing_is_read(machine: Machine) -> None:
    """Null pointers everywhere: torch's empty tensors have none other."""
    null = torch.empty(0)
    for columns in (0, 100):
        matrix = ctypes.byref(LogitMatrix(None, 0, 0, columns, columns, 1))
        machine.call("logit_statistics", matrix, null, ctypes.c_float(0), null)
        machine.call("logits_to_gradient", matrix, null, null, null, null, ctypes.c_float(0))


def test_more_rows_than_a_grid_has_blocks(machine: Machine) -> None:
    null = torch.empty(0)
    matrix = ctypes.byref(LogitMatrix(None, 0, 2**31, 1, 1, 1))
    with pytest.raises(FaultError, match="cudaError 9"):
        machine.call("logit_statistics", matrix, null, ctypes.c_float(0), null)

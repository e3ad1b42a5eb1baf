"""torch.ops.illada on a real GPU, compared with fp64: skipped without one.

test_compute_sanitizer.py looks for memory errors, races and uninitialised reads by running it under each tool.
What needs no device, every alignment and special value among it, is in test_cuda_kernels_on_host.py.
"""

import importlib.util

import pytest
import torch
from simt import reference
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if importlib.util.find_spec("illada_megatron.ops._kernels") is None:
    pytest.skip("illada_megatron.ops._kernels is not built", allow_module_level=True)
importlib.import_module("illada_megatron.ops._kernels")
if not torch._C._dispatch_has_kernel_for_dispatch_key("illada::logit_statistics", "CUDA"):
    pytest.skip("illada_megatron.ops._kernels was built without its CUDA part", allow_module_level=True)

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SOFTCAPS = (0.0, 30.0)
LAYOUTS = ("contiguous", "misaligned", "every other column", "transposed")


def random_logits(m: int, v: int, dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Logits on the device, laid out so, and targets: inside, last column, another rank's, in turn."""
    torch.manual_seed(v)
    values = (4 * torch.randn(m, v, device="cuda")).to(dtype)
    targets = torch.randint(max(v, 1), (m,), device="cuda")
    targets[1::3], targets[2::3] = v - 1, -1
    place = {
        "contiguous": lambda: values,
        "misaligned": lambda: values.new_empty(m * (v + 5) + 3)[3:].view(m, v + 5)[:, :v],
        "every other column": lambda: values.new_empty(m, 2 * v)[:, ::2],
        "transposed": lambda: values.new_empty(v, m).T,
    }[layout]()
    return place.copy_(values), targets


def row_values(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Maximum and log of the sum of a softmax, two different scales up to 1,000."""
    maximum, total, _ = reference.statistics(logits.double(), targets, softcap)
    scales = 10 ** (6 * torch.rand(2, logits.shape[0], device="cuda") - 3)
    return torch.stack((maximum, total.log(), *scales)).float()


def check(logits: Tensor, targets: Tensor, softcap: float) -> None:
    """Both passes agree with fp64; the second one's result is in the logits afterwards."""
    found = torch.ops.illada.logit_statistics(logits, targets, softcap)
    assert found.shape == (3, logits.shape[0])
    assert found.is_contiguous()
    reference.assert_statistics(found, logits, targets, softcap)
    rows = row_values(logits, targets, softcap) if logits.numel() > 0 else found.new_zeros(4, found.shape[1])
    before = logits.clone()
    torch.ops.illada.logits_to_gradient_(logits, targets, rows, softcap)
    reference.assert_gradient(logits, before, targets, rows, softcap)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_passes(dtype: torch.dtype, softcap: float, layout: str) -> None:
    for m, v in ((3, 0), (0, 7), (3, 1), (3, 33), (5, 1000), (4, 4099), (3, 20011)):
        check(*random_logits(m, v, dtype, layout), softcap)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype: torch.dtype, softcap: float) -> None:
    """-inf alone, one number among -inf, +-1e4, the largest numbers; NaN stays in its row."""
    v = 1025
    signs = torch.randint(2, (v,), device="cuda") * 2 - 1
    logits = torch.full((6, v), -torch.inf, dtype=dtype, device="cuda")
    logits[1, v // 2] = -7
    logits[2] = (1e4 * signs).to(dtype)
    logits[3] = torch.finfo(dtype).max * signs.to(dtype)
    logits[4] = torch.finfo(dtype).smallest_normal
    logits[5, 3] = torch.nan
    targets = torch.full((6,), v // 2, device="cuda")
    found = torch.ops.illada.logit_statistics(logits, targets, softcap)
    assert found[:2, 5].isnan().all()
    reference.assert_statistics(found[:, :5], logits[:5], targets[:5], softcap)
    check(logits[1:5], targets[1:5], softcap)


def test_same_bits_every_time_and_on_any_stream() -> None:
    logits, targets = random_logits(257, 20011, torch.bfloat16)
    rows = row_values(logits, targets, 0.0)
    results = []
    for _ in range(3):
        gradient = logits.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            statistics = torch.ops.illada.logit_statistics(gradient, targets, 0.0)
            torch.ops.illada.logits_to_gradient_(gradient, targets, rows, 0.0)
        stream.synchronize()
        results.append((statistics, gradient))
    for statistics, gradient in results[1:]:
        assert torch.equal(statistics, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_a_cuda_graph_replays_both_passes() -> None:
    """Neither pass allocates outside of the graph's pool nor waits for the device."""
    logits, targets = random_logits(5, 4099, torch.bfloat16)
    rows = row_values(logits, targets, 0.0)
    buffer = logits.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        statistics = torch.ops.illada.logit_statistics(buffer, targets, 0.0)
        torch.ops.illada.logits_to_gradient_(buffer, targets, rows, 0.0)
    buffer.copy_(logits)
    graph.replay()
    torch.cuda.synchronize()
    reference.assert_statistics(statistics, logits, targets, 0.0)
    reference.assert_gradient(buffer, logits, targets, rows, 0.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    logits, targets = random_logits(5, 1000, torch.bfloat16)
    found = torch.ops.illada.logit_statistics(logits.to("cuda:1"), targets.to("cuda:1"), 0.0)
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.cpu(), torch.ops.illada.logit_statistics(logits, targets, 0.0).cpu())


def test_large_more_than_2_31_elements() -> None:
    """A chunk of 13,900 rows of the whole vocabulary, 4.3 GB: its first and last rows are right."""
    m, v = 13_900, 155_136
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free device memory")
    logits = torch.zeros(m, v, dtype=torch.bfloat16, device="cuda")
    ends, targets = random_logits(4, v, torch.bfloat16)
    logits[:2], logits[-2:] = ends[:2], ends[2:]
    every_target = torch.zeros(m, dtype=torch.int64, device="cuda")
    every_target[:2], every_target[-2:] = targets[:2], targets[2:]
    found = torch.ops.illada.logit_statistics(logits, every_target, 0.0)
    reference.assert_statistics(torch.cat((found[:, :2], found[:, -2:]), 1), ends, targets, 0.0)
    assert (found[1, 2:-2] == v).all()
    rows = torch.tensor([15.0, 0.0, 2.0, 1.0], device="cuda")[:, None].repeat(1, m)
    torch.ops.illada.logits_to_gradient_(logits, every_target, rows, 0.0)
    gradient = torch.cat((logits[:2], logits[-2:]))
    reference.assert_gradient(gradient, ends, targets, rows[:, :4], 0.0)

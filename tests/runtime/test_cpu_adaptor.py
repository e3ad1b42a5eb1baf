"""The adaptor redirects names of CUDA to the CPU and leaves everything else as it was."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from illada_megatron.runtime import cpu_adaptor

if torch.cuda.is_available():
    pytest.skip("the adaptor is only ever installed where there is no GPU", allow_module_level=True)

cpu_adaptor.install()

FACTORIES: dict[str, Callable[[str], torch.Tensor]] = {
    "tensor": lambda device: torch.tensor([1.0, 2.0], device=device),
    "zeros": lambda device: torch.zeros(2, 3, device=device),
    "ones_like": lambda device: torch.ones_like(torch.zeros(2), device=device),
    "empty": lambda device: torch.empty(4, device=device, pin_memory=False),
    "arange": lambda device: torch.arange(5, device=device),
    "full": lambda device: torch.full((2,), 7.0, device=device),
}


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_factories_of_cuda_make_cpu_tensors(factory: str, device: str) -> None:
    made, expected = FACTORIES[factory](device), FACTORIES[factory]("cpu")
    assert made.device.type == "cpu"
    assert (made.shape, made.dtype) == (expected.shape, expected.dtype)
    if factory != "empty":
        assert torch.equal(made, expected)


def test_other_devices_are_left_alone() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2, device=torch.device("meta")).device.type == "meta"
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"


def test_moving_to_cuda_is_the_identity() -> None:
    tensor, module = torch.ones(3), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor
    assert module.cuda() is module
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"


def test_type_reads_as_on_a_gpu_and_still_converts() -> None:
    """megatron-core's gradient clipping asserts the name; `.type(dtype)` must go on converting."""
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1).type(dtype=torch.int64).dtype == torch.int64


def test_random_state_of_cuda_is_the_cpu_state() -> None:
    """megatron-core saves and restores it around recomputation: what is restored has to be what draws."""
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4), expected)
    assert torch.cuda.default_generators[0] is torch.default_generator


def test_streams_and_events_do_nothing() -> None:
    event = torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        event.record()
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.synchronize()
    assert event.query()


def test_installing_again_changes_nothing() -> None:
    before = {name: getattr(torch, name) for name in ("tensor", "zeros", "empty")}
    before_type = torch.Tensor.type
    cpu_adaptor.install()
    assert before == {name: getattr(torch, name) for name in before}
    assert torch.Tensor.type is before_type
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"


def test_numbers_are_the_same_with_and_without() -> None:
    """The same operators run: draws, matrix products and a training step to the bit, in two fresh processes."""
    program = """
import hashlib, sys, torch
if sys.argv[1] == "with":
    from illada_megatron.runtime import cpu_adaptor
    cpu_adaptor.install()
torch.manual_seed(3)
layer = torch.nn.Linear(33, 17)
optimizer = torch.optim.AdamW(layer.parameters())
for _ in range(3):
    layer(torch.randn(5, 33)).square().sum().backward()
    optimizer.step()
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in layer.parameters())).hexdigest())
"""
    run = [subprocess.run([sys.executable, "-c", program, how], capture_output=True) for how in ("with", "without")]
    assert [process.returncode for process in run] == [0, 0], run
    assert run[0].stdout == run[1].stdout
    assert len(run[0].stdout) > 32


def test_collectives_over_one_rank_and_in_place_copy_nothing(
    single_process: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a distributed optimizer of one rank asks for becomes gloo's all-reduce; other calls are gloo's own."""
    buffer, other = torch.arange(6.0), torch.empty(6)
    reduced, all_reduce = [], torch.distributed.all_reduce

    def watched(tensor: torch.Tensor, **options: object) -> object:
        reduced.append(tensor)
        return all_reduce(tensor, **options)

    monkeypatch.setattr(torch.distributed, "all_reduce", watched)
    for collective in (torch.distributed.reduce_scatter_tensor, torch.distributed.all_gather_into_tensor):
        collective(buffer, buffer)
        assert torch.equal(buffer, torch.arange(6.0))
        collective(other.zero_(), buffer)
        assert torch.equal(other, buffer)
    assert len(reduced) == 2
    assert all(one is buffer for one in reduced)
    monkeypatch.undo()
    with torch.distributed._coalescing_manager(None, async_ops=True) as handle:
        torch.distributed.reduce_scatter_tensor(buffer, buffer, async_op=True)
    handle.wait()
    assert torch.equal(buffer, torch.arange(6.0))


def test_the_compiler_is_not_imported() -> None:
    """megatron-core applies torch.compile when it is imported; a new process, as other tests have imported it."""
    script = """
import sys
import illada_megatron.training
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train
import torch
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile(torch.sin) is not torch.sin
print(bias_dropout_add_fused_train((torch.ones(2), None), torch.ones(2), 0.0))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tensor([2., 2.])\n"

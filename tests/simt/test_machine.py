"""The machine finds what a device would leave undefined; its shuffles and its 16-bit conversions are right.

Without this, a green test of a kernel on the machine would say little.
"""

import ctypes

import numpy as np
import pytest
import torch
from simt.harness import FaultError, Machine, machine


@pytest.fixture(scope="module", name="machine")
def compiled_machine() -> Machine:
    return machine()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("some_return_before_the_barrier", r"40 wait in __syncthreads \(first thread 0, line \d+\); 24 have returned"),
        ("two_barriers_at_once", r"divergent barrier: threads of block 0 wait at line \d+ and at line \d+"),
        ("lanes_missing_from_a_shuffle", r"32 wait in a shuffle for a lane that does not come"),
        ("shuffle_from_a_lane_outside_its_mask", r"reads lane 16, which takes no part in it \(thread 15 of block 0\)"),
        ("misaligned_vector", r"misaligned access of 16 bytes, 2 after"),
        ("overflow", r"undefined behaviour"),
    ],
)
def test_a_wrong_kernel_is_a_fault(machine: Machine, example: str, message: str) -> None:
    memory = torch.full((4,), -1, dtype=torch.int32)
    with pytest.raises(FaultError, match=message):
        machine.call("example", example.encode(), memory)


@pytest.mark.parametrize("guard_after", [False, True])
def test_guarded_memory_ends_where_it_says(machine: Machine, guard_after: bool) -> None:
    with machine.memory(100, guard_after) as address:
        for inside in (0, 99):
            machine.call("example", b"read_at", ctypes.c_void_p(address + inside))
        outside = address + (100 if guard_after else -1)
        with pytest.raises(FaultError, match=f"access outside of memory at {outside:#x} .thread 0 of block 0"):
            machine.call("example", b"read_at", ctypes.c_void_p(outside))


def test_a_missing_barrier_shows_in_the_order_of_threads(machine: Machine) -> None:
    """Shared memory that is read too early is NaN; the other order hides the mistake, so tests use several."""
    seen = []
    for order in (0, 1):
        out = torch.zeros(1)
        machine.set_order(order)
        machine.call("example", b"no_barrier_before_the_read", out)
        seen.append(float(out))
    machine.set_order(0)
    assert np.isnan(seen[0])
    assert seen[1] == 1.0


@pytest.mark.parametrize("order", [0, 1, 7])
def test_shuffles(machine: Machine, order: int) -> None:
    out = torch.full((64, 4), -1, dtype=torch.int32)
    machine.set_order(order)
    machine.call("example", b"shuffles", out)
    machine.set_order(0)
    lane = torch.arange(64) % 32
    down = torch.where(lane + 3 < 32, lane + 3, lane)
    within_8 = torch.where(lane % 8 + 3 < 8, lane + 3, lane)
    expected = torch.stack((down, lane ^ 5, torch.full_like(lane, 7), within_8), 1)
    assert torch.equal(out.long(), expected)


def test_16_bit_conversions_are_those_of_torch(machine: Machine) -> None:
    generator = torch.Generator().manual_seed(0)
    random_bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    of_half_size = torch.randn(200_000, generator=generator) * torch.logspace(-9, 5, 200_000)
    ties = torch.arange(-(2**16), 2**16).float() * 2.0**-25  # every half, half-way between two or not, near 0
    values = torch.cat((random_bits, of_half_size, ties, torch.tensor([0.0, -0.0, 65504, 65519.9, 65520, torch.inf])))
    count = ctypes.c_int64(values.numel())
    for name, dtype in (("to_half", torch.float16), ("to_bfloat16", torch.bfloat16)):
        found = torch.empty(values.numel(), dtype=dtype)
        machine.call(name, values, found, count)
        numbers = ~values.isnan()
        assert torch.equal(found[numbers].view(torch.int16), values.to(dtype)[numbers].view(torch.int16))
        assert found[~numbers].isnan().all()
    every = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    widened = torch.empty(2**16)
    machine.call("from_half", every, widened, ctypes.c_int64(2**16))
    assert torch.equal(widened.nan_to_num(12345), every.float().nan_to_num(12345))

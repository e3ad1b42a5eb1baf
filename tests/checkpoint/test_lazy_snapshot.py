"""What is written while the run goes on is the state as it was, whichever thread is quicker."""

import threading
import time

import pytest
import torch

from illada_megatron.checkpoint.lazy_snapshot import Handover
from illada_megatron.checkpoint.sharded import Part

HOUR = 3600.0


def _parts(count: int) -> list[Part]:
    return [Part(f"p{index}", (4,), (0,), torch.full((4,), float(index))) for index in range(count)]


def _copy(part: Part) -> torch.Tensor:
    return part.tensor.clone()


@pytest.mark.parametrize(("write_seconds", "copy_seconds"), [(0.002, 0.0), (0.0, 0.002), (0.001, 0.001)])
def test_parts_change_only_when_they_are_safe(write_seconds: float, copy_seconds: float) -> None:
    """A writer that is slower, faster, as fast as the run that copies away from under it."""
    parts = _parts(40)
    handover, written = Handover(parts), {}

    def write() -> None:
        for part in handover:
            before = part.tensor.clone()
            time.sleep(write_seconds)
            assert torch.equal(before, part.tensor)  # nobody changed it under the writer's hands
            written[part.name] = before

    def copy(part: Part) -> torch.Tensor:
        time.sleep(copy_seconds)
        return part.tensor.clone()

    thread = threading.Thread(target=write)
    thread.start()
    time.sleep(0.01)
    handover.secure(copy, HOUR)
    for part in parts:
        part.tensor.fill_(-1.0)
    thread.join()
    assert {name: value[0].item() for name, value in written.items()} == {f"p{i}": float(i) for i in range(40)}


def test_nothing_is_copied_when_all_is_written() -> None:
    handover = Handover(_parts(3))
    assert [part.name for part in handover] == ["p0", "p1", "p2"]
    handover.secure(lambda part: pytest.fail(f"copied {part.name}"), HOUR)


def test_writer_that_has_not_begun() -> None:
    parts = _parts(3)
    handover = Handover(parts)
    handover.secure(_copy, HOUR)
    for part in parts:
        part.tensor.zero_()
    assert sorted(part.tensor[0].item() for part in handover) == [0.0, 1.0, 2.0]


def test_writer_that_gives_up_holds_nobody() -> None:
    """A full disk: the run must not wait for parts that nobody will write."""
    handover = Handover(_parts(3))

    def give_up() -> None:
        for part in handover:
            raise OSError(f"{part.name}: no space left")

    with pytest.raises(OSError, match="no space"):
        give_up()
    handover.secure(lambda part: pytest.fail(f"copied {part.name}"), HOUR)


def test_a_save_that_ends_before_it_writes_costs_no_copy() -> None:
    """It failed at its preparation: nobody will write, and the memory is nobody's."""
    parts = _parts(3)
    handover = Handover(parts)
    handover.close()
    handover.secure(lambda part: pytest.fail(f"copied {part.name}"), HOUR)
    assert list(handover) == []


def test_a_write_that_hangs_does_not_hold_the_run() -> None:
    """A file system that does not answer has one part in its hands. The run goes on; what is written is no state."""
    handover, answered = Handover(_parts(3)), threading.Event()
    found: list[object] = []

    def write() -> None:
        try:
            for _ in handover:
                answered.wait()
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    while not handover._reading_live:
        time.sleep(0.001)
    handover.secure(_copy, 0.01)
    assert thread.is_alive()
    answered.set()
    thread.join()
    (error,) = found
    assert "the files do not hold one state" in str(error)

"""Which rank is named as slow."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from launch import launch, rank_processes, wait_for_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from illada_megatron.config.layout import Layout
from illada_megatron.training.stragglers import ComputeClock, ComputeTimes


def _times(layout: tuple[int, int, int], seconds: list[float]) -> ComputeTimes:
    tensor, pipeline, data = layout
    size = tensor * pipeline * data
    return ComputeTimes(
        Layout(size, tensor, pipeline, 1, 1, data, 1), [f"node{rank // 2}" for rank in range(size)], seconds
    )


def test_ranks_are_compared_with_those_that_do_the_same() -> None:
    """Another stage may well take three times as long (it has the head); a rank of the same stage may not."""
    stages = _times((1, 2, 3), [1.0, 1.1, 1.0, 3.0, 3.1, 3.0])
    assert stages.straggler(1.2) is None
    assert stages.scalars()["slowest_rank"] == 4.0
    assert stages.scalars()["compute_seconds_median"] == pytest.approx(2.05)
    slow = _times((1, 2, 3), [1.0, 1.3, 1.0, 3.0, 3.3, 3.0]).straggler(1.2)
    assert slow is not None
    assert "rank 1 on node0 computes 1.300 s of a step, 1.30 times the median of its 3" in slow
    # tensor 2, data 2, pipeline 2: the peer of rank 5 is rank 7
    both = _times((2, 2, 2), [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0]).straggler(1.2)
    assert both is not None
    assert "rank 5 on node2 computes 2.000 s" in both
    assert _times((2, 1, 1), [1.0, 2.0]).straggler(1.2) is None  # nobody else does the same


def test_the_clock_takes_forward_and_backward_passes_alone() -> None:
    """The names of megatron-core's timers; what is timed outside of a step (validation) does not count."""
    clock = ComputeClock(is_cuda=False)
    clock("forward-compute", log_level=2).start()
    time.sleep(0.05)
    clock("forward-compute").stop()
    clock.begin_step()
    for name in ("forward-compute", "all-grads-sync", "backward-compute"):
        clock(name, log_level=1).start(barrier=True)
        time.sleep(0.02 if name != "all-grads-sync" else 0.5)
        clock(name).stop()
    clock.end_step()
    assert 0.04 <= clock._seconds < 0.4


def test_a_slow_rank_is_named(small: tuple[str, ...], tmp_path: Path) -> None:
    """One of two ranks is held up again and again. Both take equally long for a step; only one of them computes."""
    jsonl, tensorboard = tmp_path / "steps.jsonl", tmp_path / "tensorboard"
    arguments = [*small, "training.train_steps=100000", f"logging.tensorboard_dir={tensorboard}"]
    arguments += ["faults.straggler_ratio=1.5", "validation.interval_steps=null", "logging.interval_steps=5"]

    def hold_up(launcher: psutil.Process) -> None:
        wait_for_step(jsonl, 4, launcher)
        held = rank_processes(launcher)[1].pid
        enough = threading.Event()

        def hold() -> None:
            while not enough.wait(0.02):
                os.kill(held, signal.SIGSTOP)
                enough.wait(0.1)
                os.kill(held, signal.SIGCONT)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            wait_for_step(jsonl, 41, launcher)  # of many intervals, as a busy machine holds up the other rank, too
        finally:
            enough.set()
            thread.join()
        launcher.send_signal(signal.SIGUSR1)  # handed on to the ranks, as SIGTERM and SIGINT are

    run = launch("train", arguments, 2, jsonl, hold_up)
    assert run.process.returncode == 0, run.output
    assert "stopped by SIGUSR1" in run.process.stdout
    named = re.findall(r"straggler: rank (\d) on \S+ computes", run.process.stdout)
    assert named.count("1") >= 2, run.output
    assert named.count("1") > named.count("0")
    events = EventAccumulator(str(tensorboard)).Reload()
    slowest = [event.value for event in events.Scalars("stragglers/slowest_rank")]
    assert slowest.count(1.0) >= 2
    least, most = (
        [event.value for event in events.Scalars(f"stragglers/compute_seconds_{which}")] for which in ("min", "max")
    )
    assert max(high / low for low, high in zip(least, most, strict=True)) > 1.5

"""Which signals stop a run in order, and which of them end it at once."""

import os
import signal
import time

import psutil
import pytest
from launch import launch, rank_processes

from illada_megatron.training.signals import StopSignals


def test_a_warning_only_raises_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR1 may come again; the SIGTERM that follows it, at Slurm's time limit, must not interrupt the save. The
    second SIGTERM acts as it would have without the handler, the same one delivered twice does not."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    ended = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        with StopSignals() as signals:
            assert signals.received is None
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
                now += 10.0
                assert signals.received == "SIGUSR1"
                assert not ended
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended == [signal.SIGTERM]
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            now += 1.0
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == "SIGTERM"
            assert len(ended) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_ranks_start_up(number: signal.Signals, tiny_run: tuple[str, ...]) -> None:
    """There is nothing to save: they end at once and without a traceback, the launcher as one that the signal ended."""

    def interrupt(launcher: psutil.Process) -> None:
        while len(rank_processes(launcher)) < 2:
            assert launcher.status() != psutil.STATUS_ZOMBIE
            time.sleep(0.01)
        time.sleep(1.0)  # they import torch
        launcher.send_signal(number)

    run = launch("train", [*tiny_run, "--max-restarts", "3"], 2, interrupt=interrupt)
    assert run.process.returncode == 128 + number, run.output
    assert f"stopped by {number.name} before the ranks had begun" in run.process.stderr
    for noise in ("Traceback", "failed", "restart", "WARNING", "ERROR"):
        assert noise not in run.output, run.output

"""Work divided among processes: its bar."""

import threading
import time
from pathlib import Path
from typing import Any

from illada_megatron.checkpoint.tools.processes import Pool, moved, pool


def _half_then_wait(waited_for: Path, task: int) -> int:
    """Says that it is half done, and ends when there is a file."""
    moved(task // 2)
    while not waited_for.exists():
        time.sleep(0.01)
    return task


def test_the_bar_moves_while_tasks_run(tmp_path: Path) -> None:
    """By what they say, and to exactly their bytes at their end; a second run of the pool begins at zero."""
    file, results = tmp_path / "go on", []

    def run(workers: Pool) -> None:
        results.append(workers.run("first", _half_then_wait, [100, 301], [100, 301]))

    with pool(file, 2, show=False) as workers:
        thread = threading.Thread(target=run, args=(workers,))
        thread.start()
        bars: Any = workers._progress.tasks
        while not bars or bars[0].completed < 200:
            assert thread.is_alive()
            time.sleep(0.01)
        assert bars[0].completed == 200
        file.touch()
        thread.join()
        assert bars[0].completed == bars[0].total == 401
        assert results == [[100, 301]]
        assert workers.run("second", _half_then_wait, [7], [7]) == [7]
        assert workers._progress.tasks[1].completed == 7

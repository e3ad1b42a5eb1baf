"""What several ranks find out together: reads that fail on one of them, saves in which one of them hangs or stops."""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from launch import HANG_SECONDS
from ranks import run_ranks, start_ranks
from test_store import _checkpoint

from illada_megatron.checkpoint import saver as saver_module
from illada_megatron.checkpoint.exchange import Exchange
from illada_megatron.checkpoint.files import patience
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.tensors import TensorWriter
from illada_megatron.checkpoint.owner import owned
from illada_megatron.checkpoint.saver import SaveOutcome, Saver
from illada_megatron.checkpoint.store import checkpoint_to_continue, newest_complete
from illada_megatron.config import CheckpointConfig, load_config
from illada_megatron.runtime import runtime
from illada_megatron.training.setup import TrainingState, setup
from illada_megatron.training.trainer import train_step


def _read_together(rank: int, directory: str) -> None:
    """Rank 1 cannot read at first, then not at all, then does not see the folder, then finds a changed byte."""
    dist.init_process_group("gloo")
    save_dir = Path(directory)
    patience._PAUSES_SECONDS = (0.0, 0.0)
    size, looked, failures, unseen = LocalFolder.size, list[str](), 0, False

    def look(place: LocalFolder, name: str) -> int | None:
        nonlocal failures
        looked.append(name)
        if rank == 1 and failures:
            failures -= 1
            raise OSError(5, "Input/output error", f"{place}/{name}")
        return None if unseen and rank == 1 else size(place, name)

    LocalFolder.size = look  # type: ignore[method-assign]

    failures = 2
    info, refused = newest_complete(save_dir)
    assert info is not None
    assert (info.step, refused) == (20, [])
    # each file by one rank, and by each the record, which says that it sees the folder
    share = ["a.distcp", "b"][rank]
    assert sorted(set(looked)) == sorted([share, "checkpoint.json"])

    failures = 1000
    with pytest.raises(OSError, match=r"step_00000020: cannot be read now, .*rank 1 on .*Input/output.*1 of 2"):
        newest_complete(save_dir)
    failures, unseen = 0, True
    with pytest.raises(OSError, match=r"rank 1 .*checkpoint\.json: is not seen here, but by rank 0: is this file"):
        newest_complete(save_dir)
    unseen = False
    dist.barrier()
    if rank == 0:
        (save_dir / "step_00000020" / "b").write_bytes(b"x")  # of rank 1's share
    dist.barrier()
    info, (reason,) = newest_complete(save_dir)
    assert info is not None
    assert info.step == 10
    assert "step_00000020/b: has 1 bytes, expected 0" in reason


def test_one_rank_that_cannot_read_decides_nothing(tmp_path: Path) -> None:
    for step in (10, 20):
        path = _checkpoint(tmp_path, step)
        assert {name.name for name in path.iterdir()} == {"a.distcp", "b", "checkpoint.json"}
    run_ranks(_read_together, 2, str(tmp_path))


def _look_for_the_past(rank: int, save_dir: str, unseen: int) -> None:
    """On one rank the file system is not mounted: the directory is not there."""
    dist.init_process_group("gloo")
    exists = LocalFolder.exists
    LocalFolder.exists = lambda place: rank != unseen and exists(place)  # type: ignore[method-assign]
    for settings in (CheckpointConfig(save_dir=save_dir), CheckpointConfig(load_dir=save_dir)):
        if unseen == 0:
            with pytest.raises(OSError, match="is not seen by rank 0, but by rank 1: is this file system mounted"):
                checkpoint_to_continue(settings)
        else:  # rank 0 tells the others where to look
            info, _ = checkpoint_to_continue(settings)
            assert info is not None
            assert info.step == 10
    with pytest.raises(CheckpointError, match="no such directory"):  # nobody sees it: nothing will come of waiting
        checkpoint_to_continue(CheckpointConfig(load_dir=f"{save_dir}/nowhere"))


@pytest.mark.parametrize("unseen", [0, 1])
def test_a_rank_that_does_not_see_the_directory_lets_no_run_begin_anew(unseen: int, tmp_path: Path) -> None:
    _checkpoint(tmp_path, 10)
    run_ranks(_look_for_the_past, 2, str(tmp_path), unseen)


def _exchange(rank: int) -> None:
    dist.init_process_group("gloo")
    sockets = len(psutil.Process().net_connections())
    exchange = Exchange("test")
    long = "x" * (9 << 20)  # more than torch's store takes at once
    assert exchange.told("first", long if rank == 0 else None) == long
    if rank:
        exchange.give("parts", {"rank": rank, "text": long})
        exchange.told("all", None)
        dist.barrier()
        return
    values, missing = exchange.take("parts", "own", time.monotonic() + HANG_SECONDS)
    assert values == ["own", *({"rank": other, "text": long} for other in (1, 2))]
    assert missing == []
    assert exchange.take("never given", "own", time.monotonic() + 0.1) == ([], [1, 2])
    exchange.forget("first")
    assert not exchange._store.check(["first"])  # type: ignore[union-attr]
    assert len(psutil.Process().net_connections()) == sockets  # a group of its own would connect it to every rank
    exchange.told("all", None)
    dist.barrier()  # it holds the store


def test_ranks_tell_each_other_through_their_store() -> None:
    run_ranks(_exchange, 3)


class _Storage:
    """Whether it answers; and a run of two steps that saves to it."""

    def __init__(self, rank: int, arguments: tuple[str, ...]) -> None:
        self.answers, self.rank = threading.Event(), rank
        self.answers.set()
        self.config = load_config(None, [*arguments, "checkpoint.save_timeout_minutes=0.1"])
        saver_module._GRACE_SECONDS, saver_module._PATIENCE_SECONDS = 1.0, 0.1
        write = TensorWriter.write

        def slow(*arguments: object) -> None:
            self.answers.wait()
            write(*arguments)  # type: ignore[arg-type]

        TensorWriter.write = slow  # type: ignore[method-assign]


def _save(saver: Saver, state: TrainingState) -> list[SaveOutcome]:
    return saver.save(state.step, [chunk.module for chunk in state.chunks], state.optimizer, state.progress())


def _steps_until_news(saver: Saver, state: TrainingState) -> SaveOutcome:
    """Together: the ranks hear of it at different steps, and go on until all have."""
    outcomes: list[SaveOutcome] = []
    heard = False
    while not heard:
        train_step(state)
        outcomes += saver.news()
        answers: list[bool] = [False, False]
        dist.all_gather_object(answers, bool(outcomes))
        heard = all(answers)
    return outcomes[0]


def _write_that_hangs(rank: int, arguments: tuple[str, ...], comes_back: bool) -> None:
    storage = _Storage(rank, arguments)
    with (
        runtime(storage.config) as run,
        owned(storage.config.checkpoint.save_dir, print) as owner,
        Saver(storage.config, {}, None, owner) as saver,
    ):
        state = setup(storage.config, run)
        train_step(state)
        if rank == 1:
            storage.answers.clear()
        assert _save(saver, state) == []
        outcome = _steps_until_news(saver, state)  # the run goes on meanwhile
        assert outcome.step == 1
        assert outcome.error is not None
        assert "rank 1: " in outcome.error
        assert "checkpoint.save_timeout_minutes" in outcome.error
        if comes_back:
            storage.answers.set()
            while saver._writing is not None and not saver._writing.ended:
                time.sleep(0.01)
            step = state.step
            _save(saver, state)
            assert [outcome.error for outcome in saver.wait() if outcome.step == step] == [None]
            assert saver.last_saved == step
        else:
            with pytest.raises(OSError, match="a save does not end; rank 1 is stuck"):
                _save(saver, state)
        state.close()


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_write_that_hangs(comes_back: bool, tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """As on a mount whose server is gone. The run goes on; where the storage answers again it saves again, else it ends
    at the next save, on both ranks: it used to wait there for ever."""
    arguments = (*tiny_run, "training.train_steps=100000", f"checkpoint.save_dir={tmp_path}")
    run_ranks(_write_that_hangs, 2, arguments, comes_back)
    found, _ = newest_complete(tmp_path)
    assert (found is not None) == comes_back


def _synchronous_write_that_hangs(rank: int, arguments: tuple[str, ...]) -> None:
    storage = _Storage(rank, arguments)
    with (
        runtime(storage.config) as run,
        owned(storage.config.checkpoint.save_dir, print) as owner,
        Saver(storage.config, {}, None, owner) as saver,
    ):
        state = setup(storage.config, run)
        train_step(state)
        if rank == 0:  # the one that the others hear from
            storage.answers.clear()
        with pytest.raises(OSError, match="a save does not end; rank 0 is stuck"):
            _save(saver, state)
        state.close()


def test_a_synchronous_write_that_hangs_on_rank_0(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*tiny_run, f"checkpoint.save_dir={tmp_path}", "checkpoint.asynchronous=false")
    run_ranks(_synchronous_write_that_hangs, 2, arguments)


def _rank_that_stops(rank: int, arguments: tuple[str, ...], directory: str) -> None:
    config = load_config(None, [*arguments, f"checkpoint.save_dir={directory}/checkpoints"])
    close = TensorWriter.close

    def stop(writer: TensorWriter) -> object:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return close(writer)

    with (
        runtime(config) as run,
        owned(config.checkpoint.save_dir, print) as owner,
        Saver(config, {}, None, owner) as saver,
    ):
        state = setup(config, run)
        train_step(state)
        TensorWriter.close = stop  # type: ignore[method-assign,assignment]
        _save(saver, state)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=10), dist.group.WORLD)
        try:
            saver.wait()
        except RuntimeError as error:
            Path(directory, "noticed").write_text(str(error))
            raise


def test_a_rank_that_stops_in_the_last_save_is_noticed(tiny_run: tuple[str, ...], tmp_path: Path) -> None:
    """The main threads wait for their writers, and no step's collective runs: they used to wait for a day."""
    waiting, stopped = start_ranks(_rank_that_stops, 2, tiny_run, str(tmp_path))
    try:
        waiting.join(HANG_SECONDS)
        assert waiting.exitcode == 1
        assert "timed out" in (tmp_path / "noticed").read_text().lower()
    finally:
        stopped.kill()
        waiting.kill()

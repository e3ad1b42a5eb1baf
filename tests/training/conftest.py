"""Runs of the small model, each made once a session however many tests look at it."""

from pathlib import Path

import pytest
from corpus import write_corpus
from launch import SMALL, Run, TrainOnce, run_warm


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of `train`: the small model on this package's sources, and a held-out set that no layout divides."""
    directory = tmp_path_factory.mktemp("corpus")
    train, held_out = write_corpus(directory / "train"), write_corpus(directory / "held_out")
    return (
        *SMALL,
        *(f"data.train_paths=[{train}]", f"data.validation_paths=[{held_out}]"),
        *("validation.interval_steps=10", "validation.num_samples=5"),
    )


@pytest.fixture(scope="session")
def train_once(small: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> TrainOnce:
    """train_once(nproc, *overrides) -> the whole run of 20 steps."""
    runs: dict[tuple[int, tuple[str, ...]], Run] = {}

    def train(nproc: int, *overrides: str) -> Run:
        key = (nproc, overrides)
        if key not in runs:
            jsonl = Path(tmp_path_factory.mktemp("run")) / "steps.jsonl"
            runs[key] = run_warm("train", [*small, *overrides], nproc, jsonl)
            assert runs[key].process.returncode == 0, runs[key].output
        return runs[key]

    return train

"""Delayed scaling's history from a run with one of another length."""

from pathlib import Path

import pytest
import torch

from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.files.tensors import TensorReader, TensorWriter, write_metadata
from illada_megatron.checkpoint.fp8_state import take_history


@pytest.mark.parametrize(
    ("own", "expected"),
    [(2, [9.0, 4.0]), (4, [9.0, 2.0, 3.0, 4.0]), (5, [9.0, 1.0, 2.0, 3.0, 4.0]), (7, [9.0, 0, 0, 1.0, 2.0, 3.0, 4.0])],
)
def test_the_newest_passes_are_taken(own: int, expected: list[float], tmp_path: Path) -> None:
    """The first row is of the pass under way, the last of the newest before it: Transformer Engine rolls rows up and
    drops the second one."""
    saved = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0])[:, None]
    place = folder(str(tmp_path))
    writer = TensorWriter(place)
    writer.write("history", saved)
    write_metadata(place, [writer.close()])
    history = torch.zeros(own, 1)
    take_history(TensorReader(place), "history", history)
    assert history[:, 0].tolist() == expected

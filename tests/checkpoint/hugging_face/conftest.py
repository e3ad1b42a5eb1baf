"""A Hugging Face directory to be changed."""

from pathlib import Path

import pytest
from random_weights import random_checkpoint, small_config

from illada_megatron.checkpoint.hugging_face.exporting import export
from illada_megatron.checkpoint.predictor import find_checkpoint


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    random_checkpoint(tmp_path / "run", small_config())
    return export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", "illada", "fp32", 10_000).directory

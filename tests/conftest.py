"""Shared fixtures."""

from collections.abc import Iterator

import pytest

from illada_megatron.config import RunConfig, load_config
from illada_megatron.runtime import Runtime, runtime

TINY = (
    *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=250", "data.sequence_length=48", "model.max_sequence_length=64"),
    *("training.precision=fp32", "training.micro_batch_size=2", "training.global_batch_size=4"),
)


@pytest.fixture(scope="module")
def tiny_config() -> RunConfig:
    """A model small enough to differentiate, with vocabulary padding (250 -> 256) and grouped queries."""
    return load_config("tiny", TINY)


@pytest.fixture(scope="module")
def single_process(tiny_config: RunConfig) -> Iterator[Runtime]:
    """A run of one rank in this process."""
    with runtime(tiny_config) as run:
        yield run

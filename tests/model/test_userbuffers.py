"""Overlap of tensor-parallel exchanges: what the layers are told, and who cannot have it. It runs on GPUs alone."""

import pytest
import torch

from illada_megatron.config import ConfigError, load_config
from illada_megatron.runtime.device import Device


def test_it_needs_transformer_engines_layers() -> None:
    from illada_megatron.model.transformer_config import transformer_config
    from illada_megatron.model.userbuffers import start_userbuffers

    overrides = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "training.precision=bf16"]
    config = load_config("tiny", [*overrides, "parallel.tp_comm_overlap=true"])
    core = transformer_config(config, Device(torch.device("cpu"), "CPU", None), "local")
    assert core.tp_comm_overlap
    with pytest.raises(ConfigError, match="needs Transformer Engine's layers"):
        start_userbuffers(core, "local", 256)

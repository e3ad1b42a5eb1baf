"""The device of tests marked gpu: a GPU where there is one, else this CPU, which takes their steps in miniature."""

import pytest
import torch

from illada_megatron.ops import kernels
from illada_megatron.runtime.device import has_transformer_engine, transformer_engine_problem

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def need_kernels() -> None:
    """Skip where the masked loss's compiled kernels lack this device's part."""
    if (reason := kernels.missing("logit_statistics", DEVICE)) is not None:
        pytest.skip(f"no kernels: {reason}")


def need_layers(implementation: str) -> None:
    """Skip where Transformer Engine is asked for and cannot run."""
    if implementation != "transformer_engine":
        return
    if not ON_GPU:
        pytest.skip("no TE: needs a GPU")
    if not has_transformer_engine():
        pytest.skip(f"no TE: {transformer_engine_problem() or 'it is not installed'}")

"""The same bits from the same inputs on the same machines: what has to be said to whom, before any of them begins."""

import os

import torch

from illada_megatron.config import ConfigError

# variable -> what is set where it is not; what else it may be. Read by Transformer Engine at each attention, by cuBLAS
# when it begins, by NCCL when it connects a group. NVLink's switches (NVLS) add up in an order of their own, and a
# tree's may be another in each run (megatron-core 0.19, training/determinism.py).
_VARIABLES = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", ()),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", (":16:8",)),
    "NCCL_ALGO": ("Ring", ("CollnetDirect", "CollnetChain", "^NVLS")),
}


def make_deterministic() -> None:
    """For training.deterministic. An operation of torch that has no deterministic form is an error from now on.

    Raises ConfigError where the environment asks for something else.
    """
    for name, (value, others) in _VARIABLES.items():
        found = os.environ.setdefault(name, value)
        if found not in (value, *others):
            raise ConfigError(
                f"training.deterministic true needs {name} to be {' or '.join((value, *others))}, found {found} in the "
                "environment: unset it, or set training.deterministic=false"
            )
    torch.use_deterministic_algorithms(True)
    # what is never read need not be the same
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

"""training.deterministic: what torch, cuBLAS, NCCL and Transformer Engine are told before any of them begins."""

import os
import subprocess
import sys

CODE = """
import os, torch
from illada_megatron.config import ConfigError, load_config
from illada_megatron.runtime import runtime
try:
    with runtime(load_config(None, ["runtime.device=cpu", "training.deterministic=true"])):
        assert torch.are_deterministic_algorithms_enabled()
        names = ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
        print(*(os.environ[name] for name in names))
except ConfigError as error:
    print(error)
"""


def _told(**environment: str) -> str:
    names = ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    own = {name: value for name, value in os.environ.items() if name not in names} | environment
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=own)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_libraries_are_told() -> None:
    assert _told() == "0 :4096:8 Ring"


def test_what_the_user_has_set_is_kept_or_refused() -> None:
    assert _told(NCCL_ALGO="^NVLS", CUBLAS_WORKSPACE_CONFIG=":16:8") == "0 :16:8 ^NVLS"
    said = _told(NCCL_ALGO="Tree")
    assert "training.deterministic true needs NCCL_ALGO to be Ring or CollnetDirect" in said
    assert "found Tree in the environment: unset it" in said

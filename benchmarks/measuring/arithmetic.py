"""torch as a measuring process sets it up, and what has to be said about that beside a figure."""

from importlib.metadata import version
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def environment(device: str) -> dict[str, Any]:
    """Versions, threads, and how exact fp32 products are."""
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "fp32_precision": torch.get_float32_matmul_precision(),
        "fp32_gemm_relative_error": fp32_gemm_error(),
    }


def fp32_gemm_error(size: int = 1024) -> float:
    """|C - C64| / |C64| (Frobenius) of one [size, size] product of standard normal fp32 matrices, against fp64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())

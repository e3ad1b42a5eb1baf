"""The compiled operators of `torch.ops.illada` (csrc/): loaded once, and what they can run on."""

import importlib
from functools import cache

import torch


@cache
def load_error() -> str | None:
    """Why the compiled operators cannot be used; None: they are registered."""
    try:
        importlib.import_module("illada_megatron.ops._kernels")
    except ImportError as error:  # not built, or built against another torch
        return f"{error} (build it: pip install --no-build-isolation -e .)"
    return None


def missing(operator: str, device: torch.device) -> str | None:
    """Why `torch.ops.illada.<operator>` cannot run on tensors of `device`; None: it can."""
    if (error := load_error()) is not None:
        return error
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"illada::{operator}", key):
        reason = f": {without_cuda()}" if key == "CUDA" and without_cuda() else ""
        return f"illada_megatron.ops._kernels was built without {device.type} kernels{reason}"
    return None


def without_cuda() -> str | None:
    """Why they were built without their CUDA part, or not at all; None: they have it."""
    return load_error() or importlib.import_module("illada_megatron.ops._kernels").without_cuda or None


@cache
def missing_in_layers(operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """`missing` of an operator of csrc/layer_kernels, which take float32 and bfloat16."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the compiled operator takes float32 and bfloat16, found {dtype}"
    return missing(operator, device)


@cache
def has_cpu_products(dtype: torch.dtype) -> bool:
    """Whether the operators that multiply within a block run on this CPU (csrc/cpu/products.cpp), and are built."""
    return load_error() is None and bool(torch.ops.illada.has_cpu_products(dtype))

"""The compiled operators of `torch.ops.illada` (csrc/): loaded once, and what they can run on."""

import importlib
import re
from functools import cache

import torch

_OLDER = "it is an older build (pip install --no-build-isolation -e . builds it anew)"


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
    if not hasattr(torch.ops.illada, operator):
        return f"illada_megatron.ops._kernels has no {operator}: {_OLDER}"
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"illada::{operator}", key):
        reason = f": {without_cuda()}" if key == "CUDA" and without_cuda() else ""
        return f"illada_megatron.ops._kernels was built without {device.type} kernels{reason}"
    return no_image(_built("cuda_architectures"), torch.cuda.get_device_capability(device)) if key == "CUDA" else None


def without_cuda() -> str | None:
    """Why they were built without their CUDA part, or not at all; None: they have it."""
    return load_error() or _built("without_cuda") or None


@cache
def no_image(architectures: str, capability: tuple[int, int]) -> str | None:
    """Why code built for `architectures` (as TORCH_CUDA_ARCH_LIST says it: "8.0;9.0+PTX") does not run on a GPU of
    compute capability `capability`; None: it does. Machine code runs on later minor versions of its major one, PTX on
    all later ones (CUDA C++ Programming Guide, section 3.1), that of "9.0a" on no other, that of "10.0f" on its major
    version; a name, as "Hopper", is believed."""
    for entry in re.split(r"[;\s]+", architectures):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not found:
            return None
        built = (int(found[1]), int(found[2]))
        later = found[3] != "a" and built <= capability and (built[0] == capability[0] or (found[4] and not found[3]))
        if built == capability or later:
            return None
    gpu = f"{capability[0]}.{capability[1]}"
    return (
        f"illada_megatron.ops._kernels was built for {architectures}, this GPU has {gpu} (build it again with "
        f"TORCH_CUDA_ARCH_LIST={gpu})"
    )


def _built(name: str) -> str:
    """A constant of the compiled module; an older build has fewer of them."""
    module = importlib.import_module("illada_megatron.ops._kernels")
    return getattr(module, name, _OLDER)


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

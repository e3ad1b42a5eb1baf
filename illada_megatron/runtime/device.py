"""The device of this process, what it can do at most, and what is installed."""

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

from illada_megatron.config import ConfigError, RunConfig, RuntimeConfig
from illada_megatron.config.schema.precision import Recipe
from illada_megatron.ops import kernels

# Dense bf16 peaks in TFLOP/s, by a part of the device's name; the first match counts. NVIDIA's pages print twice as
# much, "with sparsity": 1,979 for H100 and H200 SXM and GH200, 1,671 for their NVL cards, 1,513 for H100 PCIe, 4,500
# for B200 and 5,000 for each GPU of a GB200. GB300 and B300 are left out: sources differ.
_BF16_PEAK_TFLOPS = {
    "H100 NVL": 835.5,
    "H200 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "H200": 989.4,
    "A100": 312.0,
    "GB200": 2500.0,
    "B200": 2250.0,
}


@dataclass(frozen=True)
class Device:
    """Where this rank computes."""

    torch_device: torch.device
    name: str
    peak_tflops: float | None
    """Dense peak in the run's precision; None: not known, MFU is not reported."""

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"


@dataclass(frozen=True)
class Capability:
    """A part that speeds training up where it is installed."""

    name: str
    found: str | None
    """Its version; None: missing."""
    brings: str
    problem: str | None = None
    """Why it cannot be used although it is installed."""

    def text(self) -> str:
        """Its version, or why there is none."""
        if self.found:
            return self.found
        state = f"not usable, because {self.problem};" if self.problem else "missing:"
        return f"{state} would bring {self.brings}"


def select_device(config: RunConfig) -> Device:
    """The device that `runtime.device` names; "auto": this rank's GPU if there is one. Raises ConfigError."""
    wanted = config.runtime.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device: cuda was asked for, but torch finds no GPU; use runtime.device=cpu or auto, or check the "
            "driver and that torch is a CUDA build"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        name = f"CPU, {config.runtime.num_threads or _threads()} threads a rank"
        return Device(torch.device("cpu"), name, config.runtime.peak_tflops)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {index} has no GPU of its own: {torch.cuda.device_count()} are visible; start that many ranks "
            "on this machine"
        )
    name = torch.cuda.get_device_name(index)
    peak = config.runtime.peak_tflops
    if peak is None and config.training.precision != "fp32":
        # of all GPUs that do FP8 products, they are twice as fast as bf16 ones
        peak = (bf16_peak_tflops(name) or 0.0) * (2 if config.training.precision == "fp8" else 1) or None
    return Device(torch.device("cuda", index), name, peak)


def bf16_peak_tflops(name: str) -> float | None:
    """Dense bf16 peak (TFLOP/s) of a GPU by the name that CUDA gives it; None: not known."""
    return next((value for part, value in _BF16_PEAK_TFLOPS.items() if part in name), None)


def fp8_problem(recipe: Recipe) -> str | None:
    """Why this GPU cannot train with a recipe, and what to do; None: it can. Transformer Engine's own conditions
    (`pytorch/quantization.py`: check_recipe_support, 2.11.0 and 2.20.2)."""
    major, minor = torch.cuda.get_device_capability()
    found = f"its compute capability is {major}.{minor}"
    if recipe == "mxfp8" and not (10, 0) <= (major, minor) < (12, 0):
        return f"{found}, expected 10.x (Blackwell): set fp8.recipe=tensorwise"
    if recipe == "blockwise" and (major, minor) < (9, 0):
        return f"{found}, expected 9.0 (Hopper) or newer: set fp8.recipe=tensorwise where it is 8.9"
    if recipe == "blockwise" and _cuda_version() < (12, 9):
        return f"torch was built for CUDA {torch.version.cuda}, expected 12.9 or newer: set fp8.recipe=tensorwise"
    if (major, minor) < (8, 9):
        return f"{found}, expected 8.9 or newer: take an H100 or newer"
    return None


def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in (torch.version.cuda or "0").split("."))


def set_threads(settings: RuntimeConfig) -> None:
    """Divide the cores among the ranks of this machine; oversubscribed ranks wait for each other."""
    torch.set_num_threads(settings.num_threads or _threads())


def has_transformer_engine() -> bool:
    """Installed, and its compiled modules load. megatron-core's own flag hides import errors, so try it here."""
    return transformer_engine_problem() is None and _installed("transformer_engine")


def transformer_engine_version() -> tuple[int, int]:
    """Major and minor version of the Transformer Engine that is installed; (0, 0): none."""
    try:
        major, minor = version("transformer-engine").split(".")[:2]
    except PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


@lru_cache(maxsize=1)
def transformer_engine_problem() -> str | None:
    """Why an installed Transformer Engine cannot be used (None: it can, or there is none): its package of Python files
    alone, an extension built for another torch, or the folder that pip leaves behind when it is uninstalled."""
    if not _installed("transformer_engine"):
        return None
    if (problem := _import_error("transformer_engine.pytorch", "transformer_engine_torch")) is not None:
        return problem
    if not hasattr(importlib.import_module("transformer_engine.pytorch"), "Linear"):
        return "transformer_engine.pytorch has no Linear: its installation is incomplete"
    return None


def has_apex() -> bool:
    """NVIDIA's Apex with its compiled GEMM that accumulates weight gradients (model/main_grad.py uses it where it is);
    neither Apex built for Python only nor PyPI's package `apex` has it."""
    return _installed("apex") and _installed("fused_weight_gradient_mlp_cuda") and apex_problem() is None


@lru_cache(maxsize=1)
def apex_problem() -> str | None:
    """Why an installed Apex cannot be used (None: it can, or there is none): mostly that it was built for another
    torch."""
    if not (_installed("apex") and _installed("fused_weight_gradient_mlp_cuda")):
        return None
    return _import_error("apex", "fused_weight_gradient_mlp_cuda", "amp_C")


def capabilities() -> list[Capability]:
    """What was found and what is missing, with what each would bring."""
    cuda = f"{torch.version.cuda}, {torch.cuda.device_count()} device(s)" if torch.cuda.is_available() else None
    return [
        Capability("torch", torch.__version__, "tensors, gloo and NCCL"),
        Capability("megatron-core", _version("megatron-core"), "tensor, pipeline and data parallelism"),
        Capability(
            "CUDA kernels",
            "built" if kernels.without_cuda() is None else None,
            "the fused masked loss on GPUs",
            kernels.without_cuda(),
        ),
        Capability("CUDA", cuda, "training on GPUs over NCCL, bf16 at full speed"),
        Capability(
            "Transformer Engine",
            _version("transformer-engine", "transformer-engine-torch") if has_transformer_engine() else None,
            "fused norms and linears, flash and cuDNN attention, FP8 on H100",
            transformer_engine_problem(),
        ),
        Capability(
            "Apex (NVIDIA's)",
            _version("apex") if has_apex() else None,
            "fused AdamW, and a GEMM of its own for the local layers' weight gradients",
            apex_problem(),
        ),
    ]


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _import_error(*modules: str) -> str | None:
    """Why one of them does not load."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a library that does not load raises what its loader likes
            return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def _version(*packages: str) -> str | None:
    """Of the first that is installed."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None

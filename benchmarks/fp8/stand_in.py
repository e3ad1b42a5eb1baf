"""Transformer Engine's Python without its libraries: what has to be in place before it is imported.

`install` makes `import transformer_engine.pytorch` work on a machine without a GPU: the Python of the published wheel
(0.7 MB) runs, over `transformer_engine_torch`'s enumerations and the kernels of `kernels.py`; whatever else of it is
called raises. The process is told of an H100, and is good for nothing else afterwards. The wheel lies in a folder of
its own: installed among the others it would be found by megatron-core, which cannot be imported then.
"""

import enum
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

from benchmarks.fp8 import kernels

FOLDER = Path(os.environ.get("TRANSFORMER_ENGINE_PYTHON") or Path(sys.prefix) / "share" / "transformer-engine")
HOW = (
    f"needs Transformer Engine or its Python: {sys.executable} -m pip install --no-deps --target {FOLDER} "
    "-r requirements-te.txt"
)
# their order is their value in transformer_engine's headers
_ENUMERATIONS = {
    "DType": (
        *("kByte", "kInt16", "kInt32", "kInt64", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2"),
        *("kFloat8E8M0", "kFloat4E2M1"),
    ),
    "FP8FwdTensors": tuple(f"GEMM{n}_{what}" for n in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")),
    "FP8BwdTensors": tuple(f"{what}{n}" for n in (1, 2, 3) for what in ("GRAD_OUTPUT", "GRAD_INPUT")),
    "Float8BlockScaleTensorFormat": ("GEMM_READY", "COMPACT"),
    "CommOverlapType": ("RS", "AG"),
    "NVTE_Fused_Attn_Backend": ("NVTE_F16_max512_seqlen", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8", "NVTE_No_Backend"),
}
_KERNELS = (
    *("quantize", "dequantize", "fp8_transpose", "generic_gemm", "rmsnorm_fwd", "rmsnorm_bwd"),
    *("compute_amax", "multi_tensor_compute_scale_and_scale_inv", "multi_tensor_scale", "multi_tensor_l2norm"),
)
# exports, and kernels in Triton that nobody calls here; torch is not to find a Triton that is none
_UNUSED = (
    *("onnx", "onnxscript", "transformer_engine.pytorch.triton"),
    *(f"transformer_engine.pytorch.triton.{name}" for name in ("cross_entropy", "pad", "permutation")),
)


class _Kernels(types.ModuleType):
    """transformer_engine_torch: what has no stand-in raises when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper() or name == "NVTE_QKV_Layout":
            value: Any = MagicMock(name=name) if "_" in name else type(name, (), {})
        else:
            value = _missing(name)
        setattr(self, name, value)
        return value


def _missing(name: str) -> Any:
    def kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in on a CPU")

    kernel.__name__ = name
    return kernel


def is_installed() -> bool:
    """Transformer Engine itself; asked before `install`. Its compiled module lies inside of the package since 2.20."""
    return importlib.util.find_spec("transformer_engine") is not None


def missing() -> str | None:
    """What has to be done for `install`; None: nothing."""
    return None if (FOLDER / "transformer_engine").is_dir() else HOW


def install() -> None:
    """Before megatron-core and Transformer Engine are imported. Raises ModuleNotFoundError where the wheel is not
    there."""
    if (how := missing()) is not None:
        raise ModuleNotFoundError(how)
    sys.path.append(str(FOLDER))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no CUDA library is looked for
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # delayed scaling's factors by its own torch code
    module = _Kernels("transformer_engine_torch")
    module.__spec__ = importlib.machinery.ModuleSpec("transformer_engine_torch", None)
    for name, values in _ENUMERATIONS.items():
        setattr(module, name, enum.IntEnum(name, values, start=0))
    for name in _KERNELS:
        setattr(module, name, getattr(kernels, name))
    setattr(module, "get_cudnn_version", lambda: 91002)  # noqa: B010 (9.10.2; asked for when attention is made)
    for source in (FOLDER / "transformer_engine" / "pytorch").rglob("*.py"):
        for name in re.findall(r"\btex\.([a-z]\w*)", source.read_text()):
            getattr(module, name)  # `import *` of it takes what is there
    sys.modules["transformer_engine_torch"] = module
    for name in _UNUSED:
        if importlib.util.find_spec(name.partition(".")[0]) is None or name.startswith("transformer_engine"):
            sys.modules[name] = _any_module(name)
    tell_of_an_h100()
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda _: None


def _any_module(name: str) -> Any:
    """Of packages that only kernels and exports which nobody calls here are written with."""
    module = MagicMock(name=name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    return module


def tell_of_an_h100() -> None:
    """What torch answers Transformer Engine's modules, which ask before they are made."""
    properties = SimpleNamespace(
        major=9, minor=0, name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80 * 2**30
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: properties.name
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.version.cuda = torch.version.cuda or "13.0"

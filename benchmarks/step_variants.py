"""What takes turns in the step benchmark: whose step, on which workload, in which precision. No torch here: the process
that starts the measuring ones has to stay small."""

from dataclasses import dataclass
from typing import Any

OURS, BARE = "ours", "bare GEMMs"
MEGATRON = "megatron-core"
# megatron-core's own model without CUDA extensions, and with what its configuration offers beyond that: the three that
# go through torch.compile, and the attention's softmax in the run's precision.
_COMPILED_LAYERS = {"bias_activation_fusion": True, "bias_dropout_fusion": True}
_COMPILED_LOSS = {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"}
_SOFTMAX = {"attention_softmax_in_fp32": False}
PEER_SETTINGS: dict[str, dict[str, Any]] = {
    MEGATRON: {},
    f"{MEGATRON}, softmax in bf16": _SOFTMAX,
    f"{MEGATRON}, compiled layers": _COMPILED_LAYERS,
    f"{MEGATRON}, compiled loss": _COMPILED_LOSS,
    f"{MEGATRON}, all compiled": _COMPILED_LAYERS | _COMPILED_LOSS,
    f"{MEGATRON}, all compiled, softmax in bf16": _COMPILED_LAYERS | _COMPILED_LOSS | _SOFTMAX,
}
FASTEST_PEER = f"{MEGATRON}, all compiled, softmax in bf16"
SUBJECTS = (OURS, *PEER_SETTINGS, BARE)


@dataclass(frozen=True)
class Variant:
    """What is measured in a process of its own."""

    workload: str
    precision: str
    who: str
    """One of SUBJECTS."""

    @property
    def name(self) -> str:
        return f"{self.workload} {self.precision} {self.who}"


@dataclass(frozen=True)
class Settings:
    """What holds for all variants."""

    threads: int | None
    """CPU threads; None: the cores."""
    fp32_precision: str
    """torch.set_float32_matmul_precision."""

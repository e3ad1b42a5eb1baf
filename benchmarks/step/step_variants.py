"""What takes turns in the step benchmark: whose step, on which workload, in which precision. No torch here: the process
that starts the measuring ones has to stay small."""

from dataclasses import dataclass
from typing import Any

OURS, MEGATRON, BARE = "ours", "megatron-core", "bare GEMMs"
# What megatron-core's configuration offers without CUDA extensions. Its layers and its loss can go through
# torch.compile, and the attention's softmax takes bf16 or fp32: Megatron-LM's command line defaults to the run's
# precision, the fastest of these on the CPUs tried, which is why it is the peer.
_SOFTMAX = {"attention_softmax_in_fp32": False}
_LAYERS = {"bias_activation_fusion": True, "bias_dropout_fusion": True}
_LOSS = {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"}
PEER_SETTINGS: dict[str, dict[str, Any]] = {
    MEGATRON: _SOFTMAX,
    f"{MEGATRON}, softmax in fp32": {},
    f"{MEGATRON}, compiled layers": _SOFTMAX | _LAYERS,
    f"{MEGATRON}, compiled loss": _SOFTMAX | _LOSS,
    f"{MEGATRON}, compiled": _SOFTMAX | _LAYERS | _LOSS,
}
SAME_LAYERS = "megatron-core's model of our layers"
"""Its GPTModel, head and loss around the layers that we train: what the head alone makes of it."""
SUBJECTS = (OURS, *PEER_SETTINGS, SAME_LAYERS, BARE)


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
    weights_on_device: bool = False
    """Initial weights are drawn there, not as the package draws them (quick_weights.py)."""

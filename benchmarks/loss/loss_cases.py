"""What takes turns in the benchmark of the masked loss. No torch here."""

from dataclasses import dataclass

from benchmarks.measuring.processes import Timing

GEMMS = "bare GEMMs"
GATHERED_HIDDEN = "gathered hidden"
MEGATRON = "megatron-core"
REFERENCE, FUSED, MAIN_GRAD = "ours, reference", "ours, fused", "ours, fused into main_grad"
PEERS = (
    "all logits",
    "gathered logits",
    GATHERED_HIDDEN,
    f"{MEGATRON}, all rows",
    f"{MEGATRON}, gathered hidden",
    f"{MEGATRON} fused, gathered hidden",
    "chunked torch",
    "liger-kernel",
    "cut-cross-entropy",
)
VARIANTS = (GEMMS, *PEERS, REFERENCE, FUSED, MAIN_GRAD)
DTYPES = ("bf16", "fp32")


@dataclass(frozen=True)
class LossShape:
    """Sizes of the head."""

    rows: int
    """Tokens of the micro-batch, masked or not."""
    vocab_size: int
    hidden_size: int


SHAPES = {"cpu": LossShape(2_048, 155_136, 512), "cuda": LossShape(8_192, 155_136, 4_096)}
TINY_SHAPE = LossShape(64, 1_024, 64)


@dataclass(frozen=True)
class LossCase:
    """What a measuring process is started with: one variant; the masked shares are asked for one by one."""

    variant: str
    device: str
    dtype: str
    shape: LossShape
    threads: int | None
    fp32_precision: str

    @property
    def name(self) -> str:
        return f"{self.device} {self.dtype} {self.variant}"


@dataclass(frozen=True)
class Repetition:
    """Forward and backward pass, once."""

    timing: Timing
    extra_bytes: int | None
    """Peak above the level right before, without the gradients; None: buffers were there already."""

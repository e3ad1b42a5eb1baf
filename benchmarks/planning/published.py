"""Published speeds beside the planner's: each device's kernel_share is fitted to one row, the others show what that is
worth.

    python -m benchmarks.planning.published
"""

import json
from dataclasses import dataclass

from rich.table import Table

from illada_megatron.config.schema import Fp8Config, ModelConfig
from illada_megatron.planning.device import Device, Figure, load_device
from illada_megatron.planning.memory import memory
from illada_megatron.planning.report import layout_words
from illada_megatron.planning.step_time import step_time
from illada_megatron.planning.workload import Candidate, Workload
from illada_megatron.system.console import made_console

SEQUENCE_LENGTH = 8192
_TABLE_WIDTH = 140  # lines that a narrow terminal breaks are read more easily than cut columns
_SOURCE = "github.com/NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md and performance-summary-archive.md"


def _llama(layers: int, hidden: int, ffn: int, heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    )


MODELS = {
    "Llama 3 8B": _llama(32, 4096, 14336, 32),
    "Llama 3 70B": _llama(80, 8192, 28672, 64),
    "Llama 3.1 405B": _llama(126, 16384, 53248, 128),
}


def _layout(
    model: str, gpus: int, tensor: int, pipeline: int, virtual: int, context: int, micro_batch_size: int
) -> Candidate:
    """405B's 126 layers on 64 chunks: two each, one on the first and the last."""
    each, left = divmod(MODELS[model].num_layers, pipeline * virtual)
    ends = ((0, 0), (pipeline - 1, virtual - 1)) if left else ()
    split = tuple(
        tuple(each + bool(left) - ((rank, chunk) in ends) for chunk in range(virtual)) for rank in range(pipeline)
    )
    return Candidate(gpus, tensor, pipeline, virtual, context, micro_batch_size, "none", "fp8", split)


@dataclass(frozen=True)
class Row:
    """A published run: FP8 current scaling in all layers, bf16 gradients, userbuffers (its recipes set them), causal,
    8,192."""

    model: str
    device: str
    layout: Candidate
    global_batch_size: int
    release: str
    tokens_per_second: float
    """A GPU."""
    tflops: float
    """The same, as published: the head on all tokens, attention over half of all pairs."""
    fitted: bool = False
    recomputed: float = 0.0
    """Share of the layers that are recomputed (scripts/performance/configs/llama)."""


ROWS = (
    Row("Llama 3 70B", "h100", _layout("Llama 3 70B", 64, 4, 8, 5, 1, 1), 128, "25.11", 1602, 719, fitted=True),
    # 8 GPUs with FSDP, whose gathers NVLink hides; here as data parallel
    Row("Llama 3 8B", "h100", _layout("Llama 3 8B", 8, 1, 1, 1, 1, 1), 128, "25.11", 14451, 744, recomputed=5 / 32),
    Row("Llama 3.1 405B", "h100", _layout("Llama 3.1 405B", 1024, 8, 8, 8, 2, 1), 512, "25.11", 292, 737),
    Row("Llama 3 70B", "h100", _layout("Llama 3 70B", 64, 4, 8, 5, 1, 1), 256, "26.02", 1621, 728),
    Row("Llama 3.1 405B", "h100", _layout("Llama 3.1 405B", 1024, 8, 8, 8, 2, 1), 1536, "26.02", 311, 784),
    Row("Llama 3 8B", "b200", _layout("Llama 3 8B", 8, 1, 1, 1, 1, 2), 128, "25.11", 30624, 1576, fitted=True),
    Row("Llama 3.1 405B", "b200", _layout("Llama 3.1 405B", 128, 4, 8, 8, 2, 1), 64, "25.11", 661, 1667),
)


def row_workload(row: Row) -> Workload:
    """A causal model: a token attends to half the sequence on average, and every token meets the vocabulary."""
    return Workload(
        MODELS[row.model],
        SEQUENCE_LENGTH,
        row.global_batch_size,
        train_tokens=1e12,
        attended=SEQUENCE_LENGTH / 2,
        masked_share=1.0,
        gradient_bytes=2,
        sent_gradient_bytes=2,
        fp8=Fp8Config(param_gather=True, num_layers_at_start_in_bf16=0, num_layers_at_end_in_bf16=0),
        tp_comm_overlap=True,
    )


def predicted(row: Row, device: Device) -> float:
    """Tokens a second and GPU."""
    work = row_workload(row)
    seconds, again = (
        step_time(work, row.layout._replace(recompute=recompute), device).seconds for recompute in ("none", "full")
    )
    seconds += row.recomputed * (again - seconds)
    return row.global_batch_size * SEQUENCE_LENGTH / seconds / row.layout.gpus


def with_share(device: Device, share: float) -> Device:
    """The device with another kernel_share."""
    return device.model_copy(update={"kernel_share": Figure(value=share, source="tried")})


def fitted_share(row: Row) -> float:
    """The kernel_share with which the row comes out as published."""
    low, high, device = 0.1, 1.5, load_device(row.device)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if predicted(row, with_share(device, middle)) < row.tokens_per_second else (low, middle)
        )
    return low


def main() -> None:
    """Print the table, and its figures as JSON."""
    table = Table(title=f"tokens/s/GPU, published ({_SOURCE}) and predicted", title_justify="left")
    for name in ("model", "device", "GPUs", "layout", "batch", "release", "published", "predicted", "", "GiB"):
        table.add_column(name, justify="left" if name in ("model", "layout") else "right")
    figures = []
    for row in ROWS:
        device = load_device(row.device)
        tokens = predicted(row, device)
        miss = tokens / row.tokens_per_second - 1
        needed = memory(row_workload(row), row.layout, device).total / 2**30
        table.add_row(
            *(
                row.model,
                row.device,
                f"{row.layout.gpus:,}",
                layout_words(row.layout),
                f"{row.global_batch_size:,}",
                row.release,
            ),
            *(f"{row.tokens_per_second:,.0f}", f"{tokens:,.0f}", "fitted" if row.fitted else f"{miss:+.1%}"),
            f"{needed:.1f}",
        )
        figures.append({"model": row.model, "device": row.device, "batch": row.global_batch_size, "miss": miss})
    made_console(width=_TABLE_WIDTH).print(table)
    held = all(abs(one["miss"]) <= 0.15 for one in figures)
    print(
        json.dumps(
            {"rows": figures, "shares": {row.device: fitted_share(row) for row in ROWS if row.fitted}, "holds": held}
        )
    )


if __name__ == "__main__":
    main()

"""The compiled operators of the layers against torch's, and attention against its bare matrix products.

    python -m benchmarks.step.layer_kernels --precision bf16

Shapes are those of a micro-batch of workload W1 (workloads.py). Everything runs in one process and takes turns, a call
each a round, so that whatever else the machine does hits all alike; medians of CPU seconds are reported. The last line
is JSON; "holds": no operator is slower than torch's, and attention reaches 0.75 of its bare products' speed, as the
step does (train_step.py).
"""

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measuring.bars import at_least, show_bars, verdict
from benchmarks.step.train_step import Precision
from benchmarks.step.workloads import WORKLOADS, Workload
from illada_megatron.ops import rms_norm, segment_attention, swiglu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TORCH_BAR, PRODUCTS_BAR = 1.0, 0.75


class Contest(NamedTuple):
    """Two ways to do the same, each a call that runs forward and backward, and the products that neither can avoid."""

    name: str
    ours: Callable[[], object]
    torchs: Callable[[], object]
    products: Callable[[], object] | None = None


class Result(NamedTuple):
    """Medians, CPU milliseconds."""

    name: str
    ours_cpu_ms: float
    torch_cpu_ms: float
    products_cpu_ms: float | None


def main(
    precision: Annotated[
        list[Precision] | None, typer.Option("--precision", "-p", help="bf16, fp32; again for more. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the cores.")] = None,
) -> None:
    """Measure forward + backward of attention, RMSNorm and SwiGLU, ours and torch's.

    Example: python -m benchmarks.step.layer_kernels -p bf16 --rounds 30
    """
    if threads is not None:
        torch.set_num_threads(threads)
    report: dict[str, Any] = {
        "benchmark": "layer_kernels",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "rounds": rounds,
        "results": {},
    }
    console = Console(highlight=False, width=100)
    bars: dict[str, dict[str, Any]] = {}
    for kind in precision or list(DTYPES):
        results = [_race(contest, rounds) for contest in _contests(WORKLOADS["W1"], DTYPES[kind])]
        _show(console, kind, results)
        report["results"][str(kind)] = [one._asdict() for one in results]
        bars |= _bars(kind, results)
    show_bars(console, bars)
    report |= {"load_after": os.getloadavg()[0], **verdict(bars)}
    print(json.dumps(report))


def _contests(work: Workload, dtype: torch.dtype) -> list[Contest]:
    for operator in (segment_attention, rms_norm, swiglu):
        if (reason := operator.missing(torch.device("cpu"), dtype)) is not None:
            raise SystemExit(f"{operator.__name__} has no kernel here: {reason}")
    torch.manual_seed(0)
    return [_attention(work, dtype), _rms_norm(work, dtype), _swiglu(work, dtype)]


def _attention(work: Workload, dtype: torch.dtype) -> Contest:
    """Ours splits qkv and rotates as well; torch's is given queries, keys and values as scaled_dot_product_attention
    takes them, all sequences in one call."""
    length, heads, groups = work.sequence_length, work.num_attention_heads, work.num_query_groups
    dim, tokens = work.hidden_size // heads, work.micro_batch_size * work.sequence_length
    qkv = torch.randn(tokens, groups, heads // groups + 2, dim, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, heads, dim, dtype=dtype)
    angles = torch.outer(torch.arange(length), 1e4 ** (-torch.arange(0, dim, 2) / dim))
    offsets = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    arguments = (qkv, angles.cos(), angles.sin(), offsets, dim**-0.5)
    query, key, value = (
        torch.randn(work.micro_batch_size, length, count, dim, dtype=dtype).transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    )
    rows, transposed = (
        torch.randn(work.micro_batch_size * heads, *size, dtype=dtype) for size in ((length, dim), (dim, length))
    )
    scores = torch.empty(rows.shape[0], length, length, dtype=dtype)
    product = torch.empty_like(rows)

    def products() -> None:
        """Two forward, five backward, into tensors that exist."""
        for _ in range(3):  # q k^T, again, dO v^T
            torch.bmm(rows, transposed, out=scores)
        for _ in range(4):  # P v, P^T dO, dS^T q, dS k
            torch.bmm(scores, rows, out=product)

    return Contest(
        "attention with rotary",
        lambda: _forward_backward(segment_attention.segment_attention(*arguments), grad, qkv),
        lambda: _forward_backward(
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
            grad.view(-1, length, heads, dim).transpose(1, 2),
            query,
            key,
            value,
        ),
        products,
    )


def _rms_norm(work: Workload, dtype: torch.dtype) -> Contest:
    tokens = work.micro_batch_size * work.sequence_length
    x = torch.randn(tokens, 1, work.hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.ones(work.hidden_size, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    return Contest(
        "RMSNorm",
        lambda: _forward_backward(rms_norm.rms_norm(x, weight, 1e-5), grad, x, weight),
        lambda: _forward_backward(rms_norm.rms_norm_reference(x, weight, 1e-5), grad, x, weight),
    )


def _swiglu(work: Workload, dtype: torch.dtype) -> Contest:
    tokens = work.micro_batch_size * work.sequence_length
    x = torch.randn(tokens, 1, 2 * work.ffn_hidden_size, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, 1, work.ffn_hidden_size, dtype=dtype)
    return Contest(
        "SwiGLU",
        lambda: _forward_backward(swiglu.swiglu(x), grad, x),
        lambda: _forward_backward(swiglu.swiglu_reference(x), grad, x),
    )


def _forward_backward(out: Tensor, grad: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(out, inputs, grad)


def _race(contest: Contest, rounds: int) -> Result:
    """One call of each that is not counted, then turns."""
    ways = [way for way in contest[1:] if way is not None]
    times: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, spent in zip(ways, times, strict=True):
            start = time.process_time()
            way()
            if number:
                spent.append(time.process_time() - start)
    medians = [1e3 * median(spent) for spent in times]
    return Result(contest.name, medians[0], medians[1], medians[2] if contest.products else None)


def _bars(precision: str, results: list[Result]) -> dict[str, dict[str, Any]]:
    """What has to hold, by what it is."""
    bars = {}
    for one in results:
        bars[f"{one.name}, {precision}: torch / illada"] = at_least(TORCH_BAR, one.torch_cpu_ms / one.ours_cpu_ms)
        if one.products_cpu_ms is not None:
            ratio = one.products_cpu_ms / one.ours_cpu_ms
            bars[f"{one.name}, {precision}: products / illada"] = at_least(PRODUCTS_BAR, ratio)
    return bars


def _show(console: Console, precision: str, results: list[Result]) -> None:
    table = Table(title=f"Forward + backward, {precision}, CPU ms (medians)", title_justify="left")
    for heading in ("", "illada", "torch", "torch / illada", "bare products", "products / illada"):
        table.add_column(heading, justify="right" if heading else "left")
    for one in results:
        products = one.products_cpu_ms
        table.add_row(
            one.name,
            f"{one.ours_cpu_ms:.2f}",
            f"{one.torch_cpu_ms:.2f}",
            f"{one.torch_cpu_ms / one.ours_cpu_ms:.2f}",
            f"{products:.2f}" if products else "",
            f"{products / one.ours_cpu_ms:.2f}" if products else "",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

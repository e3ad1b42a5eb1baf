"""Training steps on the GPU, one process after the other: each has the memory to itself."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.layer_shape import Fitting, workload_of
from benchmarks.measuring.bars import at_least
from benchmarks.measuring.processes import MeasuringProcess
from benchmarks.step.step_figures import Figures
from benchmarks.step.step_variants import OURS, SAME_LAYERS, Settings, Variant
from benchmarks.step.step_worker import measure
from benchmarks.step.workloads import TINY_WORKLOADS, Workload


class RunFailedError(Exception):
    """A measurement that began and gave no figures; the message says why."""


Runs = list[tuple[Variant, Workload]]
_WARM_UP = 2
_MFU, _FP8_GAIN, _LOSS_TOLERANCE = 0.5, 1.3, 1e-2


def runs_on(fitting: Fitting | None) -> Runs:
    """The most telling first. None: in miniature, on a CPU."""
    largest, shared = (
        (TINY_WORKLOADS["W1"], TINY_WORKLOADS["W2"])
        if fitting is None
        else (workload_of(fitting.ours), workload_of(fitting.peer))
    )
    return [
        (Variant("as many layers as fit", "bf16", OURS), largest),
        (Variant("as many layers as fit", "fp8", OURS), largest),
        (Variant("with all logits", "bf16", OURS), shared),
        (Variant("with all logits", "bf16", SAME_LAYERS), shared),
    ]


def measure_run(variant: Variant, workload: Workload, steps: int, seconds: float) -> Figures:
    """`steps` timed steps. Raises RunFailedError, also after so many seconds; its process has said more on stderr."""
    settings = Settings(None, "highest", weights_on_device=True)
    process = MeasuringProcess(variant.name, measure, variant, workload, settings, seconds=seconds)
    try:
        process.receive()
        for number in range(_WARM_UP + steps):
            process.ask("warm up" if number < _WARM_UP else "step")
        return process.finish(False)
    except SystemExit as error:
        raise RunFailedError("its process ended with an error") from error


def step_results(found: dict[Variant, Figures], layers: dict[Variant, int], peak_tflops: float | None) -> list[dict]:
    """For the last line. peak_tflops: the GPU's in bf16, without sparsity; twice as much in FP8. None: not known."""
    results = []
    for variant, figures in found.items():
        one = figures.to_json()
        peak = None if peak_tflops is None else peak_tflops * (2 if variant.precision == "fp8" else 1)
        mfu = None if peak is None else one["achieved_tflops"] / peak
        results.append({**one, "layers": layers[variant], "peak_tflops": peak, "mfu": mfu})
    return results


def step_bars(results: list[dict[str, Any]], figures: dict[Variant, Figures]) -> dict[str, dict[str, Any]]:
    """What issue 16 asks of the step."""
    found = {(one["workload"], one["precision"], one["who"]): one for one in results}

    def rate(workload: str, precision: str, who: str) -> float | None:
        one = found.get((workload, precision, who))
        return None if one is None else one["tokens_per_second"]

    bf16, fp8 = (rate("as many layers as fit", precision, OURS) for precision in ("bf16", "fp8"))
    ours, peer = (rate("with all logits", "bf16", who) for who in (OURS, SAME_LAYERS))
    largest = found.get(("as many layers as fit", "bf16", OURS), {})
    work = next((one for variant, one in figures.items() if variant.workload == "with all logits"), None)
    saving = 1.0 if work is None else head_saving(work)
    bars = {
        "bf16: MFU": at_least(_MFU, largest.get("mfu")),
        "FP8 / bf16: tokens/s": at_least(_FP8_GAIN, fp8 / bf16 if fp8 and bf16 else None),
        "ours / megatron-core's model: tokens/s": at_least(saving, ours / peer if ours and peer else None),
    }
    pairs = [figures.get(Variant("with all logits", "bf16", who)) for who in (OURS, SAME_LAYERS)]
    if pairs[0] is not None and pairs[1] is not None:
        bars["losses of both: smallest agreement"] = at_least(1 - _LOSS_TOLERANCE, _agreement(pairs[0], pairs[1]))
    return bars


def head_saving(figures: Figures) -> float:
    """What a step with all tokens at the head multiplies, over what one with the masked ones does."""
    work = figures.work
    head = work.part_flops["head and loss"]
    return 1 + head * (work.tokens / work.masked_tokens - 1) / work.flops


def _agreement(one: Figures, other: Figures) -> float:
    """1 - the largest relative difference of their losses, step by step."""
    pairs = [(a.loss, b.loss) for a, b in zip(one.timings, other.timings, strict=True)]
    return 1 - max(abs(a - b) / abs(b) for a, b in pairs if a is not None and b is not None)


def show_steps(console: Console, results: list[dict[str, Any]]) -> None:
    """A table."""
    table = Table(title="Training step (medians)", title_justify="left")
    for heading in ("", "layers", "parameters", "tokens/s", "TFLOP/s", "MFU", "peak memory GiB", "step s"):
        table.add_column(heading, justify="right" if heading else "left")
    for one in results:
        table.add_row(
            f"{one['workload']}, {one['precision']}, {one['who']}",
            f"{one['layers']}",
            f"{one['parameters']:,}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['achieved_tflops']:.3f}",
            "" if one["mfu"] is None else f"{one['mfu']:.1%}",
            f"{one['peak_memory_bytes'] / 2**30:.2f}",
            f"{sorted(one['step_seconds'])[len(one['step_seconds']) // 2]:.3f}",
        )
    console.print(table)

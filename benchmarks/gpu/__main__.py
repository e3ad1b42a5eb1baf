"""What a machine with one GPU says: is the code right there, and how fast is it?

    make gpu                              # on such a machine, in about 8 minutes
    python -m benchmarks.gpu --dry        # on a CPU, in miniature: all that needs no GPU

First the tests marked gpu, then training steps of iLLaDA-8B's layers in bf16 and FP8, beside megatron-core's own model
of the same layers, then the masked loss beside its matrix products and other packages. What there is no time for is
left out and named. The last line is JSON. Ends with 1 where a test failed or a step could not run; whether the figures
reach what is asked of them is in "holds".
"""

import json
import os
import platform
import signal
import sys
import time
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console

from benchmarks.gpu.device_tests import NOTHING_COLLECTED, run_device_tests
from benchmarks.gpu.layer_shape import Fitting, layers_that_fit
from benchmarks.gpu.loss_run import measure_loss
from benchmarks.gpu.step_runs import RunFailedError, measure_run, runs_on, show_steps, step_bars, step_results
from benchmarks.measuring.bars import show_bars, verdict
from benchmarks.measuring.machine import commit, cpu_model, prepare_environment
from benchmarks.step.step_figures import Figures
from benchmarks.step.step_variants import Variant
from illada_megatron.runtime.device import bf16_peak_tflops, capabilities, fp8_problem, has_transformer_engine

_RUN_MINUTES, _LOSS_MINUTES = 1.0, 1.0
"""What a run, and the loss, is given at least; a guess until they have run on a GPU."""


def main(
    dry: Annotated[bool, typer.Option("--dry", help="On a CPU, in miniature: to try the script.")] = False,
    minutes: Annotated[float, typer.Option(min=0.0, help="For all of it; what no longer fits is left out.")] = 8.0,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each run.")] = 5,
    test: Annotated[list[str] | None, typer.Option(help="Files or folders of tests; again for more.")] = None,
    tests: Annotated[bool, typer.Option(help="Run the tests.")] = True,
) -> None:
    """Tests marked gpu, then the training step and the masked loss on this machine's GPU.

    Example: python -m benchmarks.gpu --no-tests --steps 10
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # what is running is ended then: it is in a session of its own
        signal.signal(number, _stop)
    end = time.monotonic() + 60 * minutes
    if not dry and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch finds no GPU; --dry tries the script on a CPU, in miniature")
    _prepare(dry)
    console = Console(highlight=False)
    console.width = max(console.width, 140)
    report = _machine(dry)
    console.print(f"{report['device']}, " + ", ".join(f"{name} {found}" for name, found in report["installed"].items()))
    if tests:
        most = end - time.monotonic() - 60 * (len(runs_on(None)) * _RUN_MINUTES + _LOSS_MINUTES)
        report["tests"] = run_device_tests(test or ["tests"], max(60.0, most))
        _show_tests(console, report["tests"])
    report["left_out"], report["failed_runs"] = {}, []
    figures, layers = _measure_steps(console, report, dry, steps, end)
    report["steps"] = step_results(figures, layers, None if dry else bf16_peak_tflops(report["device"]))
    show_steps(console, report["steps"])
    bars = step_bars(report["steps"], figures) | _loss_bars(report, dry, end)
    for what, why in report["left_out"].items():
        console.print(f"left out: {what}: {why}")
    report |= verdict(bars)
    show_bars(console, bars)
    print(json.dumps(report))
    found = report.get("tests", {"failed": [], "exit_code": 0})
    broken = found["failed"] or found["exit_code"] not in (0, NOTHING_COLLECTED)
    sys.exit(1 if broken or report["failed_runs"] else 0)


def _stop(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _prepare(dry: bool) -> None:
    """The environment of all that is started from here, as the launch scripts of examples/ set it."""
    prepare_environment(False)
    os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _machine(dry: bool) -> dict[str, Any]:
    return {
        "benchmark": "gpu",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dry": dry,
        "device": cpu_model() if dry else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "installed": {one.name: one.text() for one in capabilities()},
    }


def _show_tests(console: Console, found: dict[str, Any]) -> None:
    console.print(f"tests: {found['passed']} passed, {len(found['failed'])} failed")
    for reason, number in found["skipped"].items():
        console.print(f"  skipped {number}: {reason}")
    for name in found["failed"]:
        console.print(f"  failed: {name}")


def _measure_steps(
    console: Console, report: dict[str, Any], dry: bool, steps: int, end: float
) -> tuple[dict[Variant, Figures], dict[Variant, int]]:
    """The figures of each run, and its layers; the report gets what was left out for which reason, and what failed."""
    figures: dict[Variant, Figures] = {}
    layers: dict[Variant, int] = {}
    fitting = None if dry else _fitting()
    runs = runs_on(fitting)
    for number, (variant, workload) in enumerate(runs, start=1):
        # one that hangs leaves the others theirs
        own_end = end - 60 * ((len(runs) - number) * _RUN_MINUTES + _LOSS_MINUTES)
        reason = _no_fp8(dry) if variant.precision == "fp8" else None
        if (reason := reason or _no_time(end, _RUN_MINUTES)) is not None:
            report["left_out"][variant.name] = reason
            continue
        try:
            figures[variant] = measure_run(variant, workload, steps, max(60 * _RUN_MINUTES, own_end - time.monotonic()))
        except RunFailedError as error:
            _failed(report, variant.name, error)
        else:
            layers[variant] = workload.num_layers
            console.print(f"{variant.name}: {figures[variant].seconds:.3f} s a step")
    return figures, layers


def _failed(report: dict[str, Any], name: str, error: RunFailedError) -> None:
    report["left_out"][name] = str(error)
    report["failed_runs"].append(name)


def _loss_bars(report: dict[str, Any], dry: bool, end: float) -> dict[str, dict[str, Any]]:
    """The loss's own bars; what it found goes into the report."""
    if (reason := _no_time(end, _LOSS_MINUTES)) is not None:
        report["left_out"]["masked loss"] = reason
        return {}
    try:
        found = measure_loss(dry, end - time.monotonic())
    except RunFailedError as error:
        _failed(report, "masked loss", error)
        return {}
    report["loss"] = {"results": found["results"], "missing": found["missing"]}
    return found["bars"]


def _fitting() -> Fitting:
    fitting = layers_that_fit(torch.cuda.get_device_properties(0).total_memory)
    return fitting if has_transformer_engine() else fitting.of_local_layers()


def _no_fp8(dry: bool) -> str | None:
    if dry:
        return "needs a GPU"
    return fp8_problem("tensorwise") if has_transformer_engine() else "no TE"


def _no_time(end: float, minutes: float) -> str | None:
    left = max(0.0, end - time.monotonic()) / 60
    return None if left >= minutes else f"{left:.1f} minutes were left, expected {minutes:g}"


if __name__ == "__main__":
    typer.run(main)

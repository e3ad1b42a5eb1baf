"""Curves of several runs in one picture."""

from collections.abc import Sequence
from pathlib import Path

from illada_megatron.runs.comparison import By
from illada_megatron.runs.records import Curve, RunError, RunRecord
from illada_megatron.system.whole_file import replaced

# Of a step's loss: an exponential mean over so many steps.
_SMOOTHED_STEPS = 25


def draw(runs: Sequence[RunRecord], by: By, path: Path) -> None:
    """Write a PNG: loss, held-out bound where there is one, throughput. Raises RunError where matplotlib is missing,
    OSError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError(f"--png needs matplotlib, which cannot be imported ({error}): pip install matplotlib") from error
    panels = [
        (f"loss, nats/token (mean of about {_SMOOTHED_STEPS} steps)", [_smoothed(run.loss) for run in runs], "-"),
        ("held-out bound, nats/token", [run.held_out for run in runs], "o-"),
        ("tokens/s", [run.throughput for run in runs], "-"),
    ]
    panels = [panel for panel in panels if any(curve.values for curve in panel[1])]
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    for axes, (title, curves, style) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for run, curve in zip(runs, curves, strict=True):
            axes.plot(curve.steps if by == "steps" else curve.tokens, curve.values, style, label=run.name, markersize=3)
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    axes.set_xlabel(by)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=min(3, len(runs)))
    with replaced(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def _smoothed(curve: Curve) -> Curve:
    """The exponential mean, without its bias to the first value."""
    mean, weight, values = 0.0, 0.0, []
    for value in curve.values:
        mean += (value - mean) / _SMOOTHED_STEPS
        weight += (1 - weight) / _SMOOTHED_STEPS
        values.append(mean / weight)
    return Curve(curve.steps, curve.tokens, values)

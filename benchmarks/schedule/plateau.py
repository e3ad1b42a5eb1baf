"""When the rule for the plateau acts on simulated losses of illada-8b, and when the one that was here before did.

python -m benchmarks.schedule.plateau --draw docs/images/plateau.svg
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from benchmarks.schedule.loss_curves import Case, Curve, cases, noisy
from illada_megatron.system.console import made_console
from illada_megatron.training.plateau import PlateauDetector

# The demo's steps of 16 sequences have a standard deviation of 0.48 nats/token; 1280 sequences average it to 0.054.
_DEVIATIONS = (0.054, 0.48)
_OLD_WINDOW_STEPS, _OLD_IMPROVEMENT = 500, 0.002


def main(
    seeds: Annotated[int, typer.Option(help="Runs of each curve.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Fewer, larger steps, with less noise each.")] = None,
    draw: Annotated[Path | None, typer.Option(help="Write a picture of the first seeds.")] = None,
) -> None:
    """A row a curve and noise: the parts of the run after which each rule begins the decay, a figure a seed."""
    table = Table("curve", "noise of a step", "flat from", "rule before", "rule now")
    console, curves = made_console(), cases(steps)
    pictures = []
    for deviation in _DEVIATIONS:
        for case in curves:
            found = []
            for seed in range(seeds):
                losses = noisy(case.curve, deviation * scale(case), seed)
                found.append([acts(case, losses) for acts in (old_rule, new_rule)])
                if seed == 0 and deviation == _DEVIATIONS[0]:
                    pictures.append((case, losses, *found[0]))
            flat = "-" if case.flat_from is None else f"{case.flat_from / len(case.curve):.0%}"
            columns = [", ".join(_part(step, case) for step in column) for column in zip(*found, strict=True)]
            table.add_row(case.name, f"{deviation}", flat, *columns)
    console.print(table)
    if draw is not None:
        _draw(pictures, draw)


def scale(case: Case) -> float:
    """What the noise of the preset's step shrinks by in a case's larger ones."""
    training = case.config.training
    return float((1280 / training.global_batch_size) ** 0.5)


def new_rule(case: Case, losses: Curve) -> int | None:
    """The step at which the detector first finds the losses flat."""
    detector, training = PlateauDetector(case.config), case.config.training
    for step in range(case.config.schedule.warmup_steps, len(losses)):
        size = training.global_batch_size
        if detector.observe(training.lr, step * size, size, float(losses[step]))[0] is not None:
            return step
    return None


def old_rule(case: Case, losses: Curve) -> int | None:
    """The first step after which the mean of 500 losses is not 0.2 % below that of the 500 before."""
    losses = losses[case.config.schedule.warmup_steps :]
    windows = len(losses) // _OLD_WINDOW_STEPS
    means = losses[: windows * _OLD_WINDOW_STEPS].reshape(windows, _OLD_WINDOW_STEPS).mean(axis=1)
    flat = np.flatnonzero(means[1:] >= (1 - _OLD_IMPROVEMENT) * means[:-1])
    if not len(flat):
        return None
    return int(case.config.schedule.warmup_steps + (flat[0] + 2) * _OLD_WINDOW_STEPS - 1)


def _part(step: int | None, case: Case) -> str:
    return "never" if step is None else f"{step / len(case.curve):.1%}"


def _draw(pictures: list[tuple[Case, Curve, int | None, int | None]], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "svg.hashsalt": "illada", "font.family": "DejaVu Sans"})
    figure, every = plt.subplots(1, len(pictures), figsize=(11, 2.6), sharey=True)
    for axes, (case, losses, old, new) in zip(every, pictures, strict=True):
        steps = np.unique(np.geomspace(len(losses) // 200, len(losses) - 1, 160).astype(int))
        means = np.add.reduceat(losses, steps[:-1])[:-1] / np.diff(steps[:-1])
        axes.plot(steps[:-2] / len(losses), means, color="#51606f", linewidth=1.0)
        for step, colour, style, name in ((old, "#c0392b", ":", "rule before"), (new, "#1e8449", "-", "rule now")):
            if step is not None:
                axes.axvline(step / len(losses), color=colour, linestyle=style, label=name)
        axes.set_title(case.name, fontsize=8)
        axes.set_xscale("log")
        axes.set_ylim(1.93, 2.3)
        axes.set_xticks([0.01, 0.1, 1.0], ["1 %", "10 %", "100 %"])
        axes.legend(loc="upper right", fontsize=6, frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    every[0].set_ylabel("loss, nats/token")
    every[len(every) // 2].set_xlabel("part of the run's tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)

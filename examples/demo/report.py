"""What the demo says about its run: losses smoothed, the loss curve as a picture, the summary table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

# A single step's loss is noisy (weights 1/p up to 1000): figures are means over this many steps.
SMOOTHED_STEPS = 50
# ... and over these few at the start, where it falls fast
FIRST_STEPS = 10


@dataclass(frozen=True)
class Step:
    """One line of the trainer's steps.jsonl."""

    step: int
    loss: float
    """nats/token."""
    tokens_per_second: float
    consumed_tokens: int


@dataclass(frozen=True)
class Bound:
    """A held-out bound, nats/token, and its standard error."""

    value: float
    error: float
    bits_per_byte: str
    """With its own error."""


def read_steps(path: Path) -> list[Step]:
    """All steps of a run, in order."""
    records = map(json.loads, path.read_text().splitlines())
    names = Step.__dataclass_fields__
    return [Step(**{name: record[name] for name in names}) for record in records if "loss" in record]


def mean_loss(steps: Sequence[Step]) -> float:
    """Mean loss of some steps (nats/token)."""
    return fmean(step.loss for step in steps)


def tokens_per_second(steps: Sequence[Step]) -> float:
    """The median: the first steps warm everything up."""
    return median(step.tokens_per_second for step in steps)


def smoothed(steps: Sequence[Step], window: int = SMOOTHED_STEPS) -> list[float]:
    """Mean loss of the last `window` steps at each step; of fewer at the beginning."""
    return [mean_loss(steps[max(0, end - window) : end]) for end in range(1, len(steps) + 1)]


def summary_rows(
    steps: Sequence[Step], change: int, parameters: int, entropy: float, held_out: dict[int, Bound]
) -> list[tuple[str, str]]:
    """Rows of the summary table.

    change: the step after which the layout changed. entropy: of the held-out text's unigrams (nats/token).
    held_out: bound by step; its smallest and largest step are before and after training.
    """
    before, after = steps[:change], steps[change:]
    window = min(SMOOTHED_STEPS, len(before), len(after))
    last = mean_loss(steps[-window:])
    first, after_all = held_out[min(held_out)], held_out[max(held_out)]
    return [
        ("layout", f"data parallel 2 for steps 1-{change}, then tensor 2 x pipeline 2 until step {steps[-1].step}"),
        ("parameters", f"{parameters:,}"),
        ("tokens seen", f"{steps[-1].consumed_tokens:,}"),
        ("first loss", f"{mean_loss(steps[:FIRST_STEPS]):.3f} nats/token (mean of the first {FIRST_STEPS} steps)"),
        ("last loss", f"{last:.3f} nats/token (mean of the last {window} steps)"),
        ("at the change", f"{mean_loss(before[-window:]):.3f} -> {mean_loss(after[:window]):.3f}, {window} steps each"),
        (
            "held-out bound",
            f"{first.value:.3f} nats/token before training, {after_all.value:.3f} +- {after_all.error:.3f} after: "
            f"{after_all.bits_per_byte} bits/byte",
        ),
        ("unigram entropy", f"{entropy:.3f} nats/token of the held-out text, {entropy - after_all.value:.3f} above"),
        (
            "tokens/s",
            f"{tokens_per_second(before):,.0f} on 2 processes, {tokens_per_second(after):,.0f} on 4 (medians)",
        ),
    ]


def draw_loss(steps: Sequence[Step], change: int, entropy: float, held_out: dict[int, Bound], path: Path) -> None:
    """The loss curve with everything that it should be compared with, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    numbers = [step.step for step in steps]
    axes.plot(numbers, [step.loss for step in steps], ".", color="0.78", markersize=3, label="loss of each step")
    axes.plot(numbers, smoothed(steps), color="#1864ab", label=f"mean of the last {SMOOTHED_STEPS} steps")
    points = sorted(held_out)
    values, errors = [held_out[step].value for step in points], [held_out[step].error for step in points]
    label = "held-out bound, +- standard error"
    axes.errorbar(points, values, errors, fmt="o-", color="#e8590c", linewidth=1, capsize=3, markersize=4, label=label)
    label = f"unigram entropy of the held-out text, {entropy:.2f}"
    axes.axhline(entropy, color="0.35", linestyle="--", linewidth=1, label=label)
    axes.axvline(change + 0.5, color="#2b8a3e", linewidth=1)
    axes.annotate("DP 2 | TP 2 x PP 2 ", (change + 0.5, 0.02), xycoords=("data", "axes fraction"), ha="center")
    low = min(step.loss for step in steps)
    axes.set(xlabel="step", ylabel="nats/token", ylim=(max(0.0, low - 0.3), max(values) + 0.7))
    axes.legend(loc="upper right")
    axes.set_title("iLLaDA trained by `make demo`", loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)

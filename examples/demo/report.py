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


def read_steps(path: Path) -> list[Step]:
    """All steps of a run, in order."""
    records = map(json.loads, path.read_text().splitlines())
    return [Step(**{name: record[name] for name in Step.__dataclass_fields__}) for record in records]


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
    steps: Sequence[Step], change: int, parameters: int, entropy: float, held_out: dict[int, float]
) -> list[tuple[str, str]]:
    """Rows of the summary table.

    change: the step after which the layout changed. entropy: of the training corpus's unigrams (nats/token).
    held_out: bound (nats/token) by step; its smallest and largest step are before and after training.
    """
    before, after = steps[:change], steps[change:]
    window = min(SMOOTHED_STEPS, len(before), len(after))
    last = mean_loss(steps[-window:])
    first_bound, last_bound = held_out[min(held_out)], held_out[max(held_out)]
    return [
        ("layout", f"data parallel 2 for steps 1-{change}, then tensor 2 x pipeline 2 until step {steps[-1].step}"),
        ("parameters", f"{parameters:,}"),
        ("tokens seen", f"{steps[-1].consumed_tokens:,}"),
        ("first loss", f"{mean_loss(steps[:FIRST_STEPS]):.3f} nats/token (mean of the first {FIRST_STEPS} steps)"),
        ("last loss", f"{last:.3f} nats/token (mean of the last {window} steps)"),
        ("unigram entropy", f"{entropy:.3f} nats/token; the last loss is {entropy - last:.3f} below it"),
        ("at the change", f"{mean_loss(before[-window:]):.3f} -> {mean_loss(after[:window]):.3f}, {window} steps each"),
        ("held-out bound", f"{first_bound:.3f} nats/token before training, {last_bound:.3f} after"),
        (
            "tokens/s",
            f"{tokens_per_second(before):,.0f} on 2 processes, {tokens_per_second(after):,.0f} on 4 (medians)",
        ),
    ]


def draw_loss(steps: Sequence[Step], change: int, entropy: float, held_out: dict[int, float], path: Path) -> None:
    """The loss curve with everything that it should be compared with, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    numbers = [step.step for step in steps]
    axes.plot(numbers, [step.loss for step in steps], ".", color="0.78", markersize=3, label="loss of each step")
    axes.plot(numbers, smoothed(steps), color="#1864ab", label=f"mean of the last {SMOOTHED_STEPS} steps")
    points = sorted(held_out.items())
    axes.plot(*zip(*points, strict=True), "o-", color="#e8590c", linewidth=1, label="held-out bound")
    axes.axhline(entropy, color="0.35", linestyle="--", linewidth=1, label=f"unigram entropy, {entropy:.2f}")
    axes.axvline(change + 0.5, color="#2b8a3e", linewidth=1)
    axes.annotate("DP 2 | TP 2 x PP 2 ", (change + 0.5, 0.02), xycoords=("data", "axes fraction"), ha="center")
    low = min(step.loss for step in steps)
    axes.set(xlabel="step", ylabel="nats/token", ylim=(max(0.0, low - 0.3), max(held_out.values()) + 0.7))
    axes.legend(loc="upper right")
    axes.set_title("iLLaDA trained by `make demo`", loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)

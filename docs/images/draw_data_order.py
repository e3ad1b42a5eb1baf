"""Draws data-order.svg with the package's own functions: python docs/images/draw_data_order.py"""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from illada_megatron.data.corpus.blend import Proportions
from illada_megatron.data.corpus.order import derive_key, permute

TOKENS, LENGTH, CUTS = 107, 8, (0, 40, 75, 107)
WINDOWS = (TOKENS - LENGTH + 1) // LENGTH
WEIGHTS = {"web": 0.55, "code": 0.3, "math": 0.15}
COLOURS = plt.get_cmap("viridis")(np.linspace(0.15, 0.9, WINDOWS))
SHADES = ("#cfd8e3", "#b3c1d1", "#cfd8e3")


def main() -> None:
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "illada", "font.family": "DejaVu Sans"})
    figure, (stream, order, blend) = plt.subplots(3, 1, figsize=(9.5, 5.6), height_ratios=[2.6, 1.6, 2.2])
    _draw_stream(stream)
    _draw_order(order)
    _draw_blend(blend)
    for axes in (stream, order, blend):
        axes.set_yticks([])
        axes.set_xticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("data-order.svg"), metadata={"Date": None})


def _bar(axes: Axes, start: float, width: float, row: float, colour: object, text: str = "") -> None:
    axes.barh(row, width, 0.72, start, color=colour, edgecolor="white", linewidth=1.2)
    axes.text(start + width / 2, row, text, ha="center", va="center", fontsize=8)


def _phase(epoch: int) -> int:
    return derive_key(1, "picture", epoch) % LENGTH


def _draw_stream(axes: Axes) -> None:
    axes.set_title("one stream, whatever the shards; each epoch cuts it at another phase", loc="left", fontsize=10)
    for number, (start, stop) in enumerate(itertools.pairwise(CUTS)):
        _bar(axes, start, stop - start, 2, SHADES[number], f"shard {number}")
    for epoch in (0, 1):
        for window in range(WINDOWS):
            _bar(axes, _phase(epoch) + window * LENGTH, LENGTH, 1 - epoch, COLOURS[window], str(window))
        axes.text(-2, 1 - epoch, f"epoch {epoch}", ha="right", va="center")
    axes.set_xlim(-12, TOKENS + 1)


def _draw_order(axes: Axes) -> None:
    axes.set_title("samples: the windows through a keyed bijection, another one each epoch", loc="left", fontsize=10)
    for epoch in (0, 1):
        for place in range(WINDOWS):
            window = permute(place, WINDOWS, derive_key(1, "order", epoch))
            _bar(axes, place * LENGTH, LENGTH, 1 - epoch, COLOURS[window], str(window))
        axes.text(-2, 1 - epoch, f"samples {epoch * WINDOWS}…", ha="right", va="center")
    axes.set_xlim(-12, TOKENS + 1)


def _draw_blend(axes: Axes) -> None:
    shares = ", ".join(f"{name} {weight:.0%}" for name, weight in WEIGHTS.items())
    axes.set_title(
        f"a blend ({shares}): over any prefix each corpus is off by less than one sample", loc="left", fontsize=10
    )
    proportions, places = Proportions(list(WEIGHTS.values())), 40
    counts = np.array([proportions.counts(n) for n in range(places + 1)])
    colours = ("#3b528b", "#21918c", "#e3a72f")
    for place in range(places):
        corpus, index = proportions.locate(place)
        _bar(axes, place, 1, 3.2, colours[corpus])
        axes.text(place + 0.5, 3.2, str(index), ha="center", va="center", fontsize=7, color="white")
    axes.axhspan(0, 2, color="#f1f3f6")
    axes.text(-0.4, 2, "+1", ha="right", va="center", fontsize=8)
    axes.text(-0.4, 0, "−1", ha="right", va="center", fontsize=8)
    axes.text(-0.4, 3.2, "sample of\nits corpus", ha="right", va="center", fontsize=8)
    for corpus, (name, weight) in enumerate(WEIGHTS.items()):
        error = counts[:, corpus] - np.arange(places + 1) * weight
        axes.step(np.arange(places + 1), 1 + error, where="post", color=colours[corpus], label=name)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.02), ncols=3, fontsize=8, frameon=False)
    axes.set_xlim(-4, places + 0.3)


if __name__ == "__main__":
    main()

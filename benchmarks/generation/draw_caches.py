"""The picture of what caches and rules save and change."""

from pathlib import Path
from typing import Any

_MARKERS = {"steps": "o", "threshold": "s", "factor": "^", "hierarchy": "D"}
_COLOURS = {"none": "#444444", "prefix": "#1b6ca8", "dual": "#c8553d", "vicinity": "#3a7d44", "delayed": "#8e5ea2"}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """results: those of caches.py. A point for each: colour says the cache, shape the rule."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "illada", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for one in results:
        style = {"color": _COLOURS[one["cache"]], "marker": _MARKERS[one["reveal"]], "linestyle": "", "alpha": 0.85}
        if one["cache"] == "prefix":  # where nothing follows the block, it is dual
            style |= {"markersize": 11, "fillstyle": "none"}
        axes[0].plot(one["times_fewer_position_passes"], 100 * one["equal_tokens"], **style)
        axes[1].plot(one["times_fewer_position_passes"], one["bound_change"], **style)
    axes[0].set_ylabel("tokens equal to full decoding's (%)")
    axes[1].set_ylabel("change of the bound (nats/token)")
    for panel in axes:
        panel.set_xlabel("times fewer position-passes than full decoding")
        panel.grid(alpha=0.3)
    for name, colour in _COLOURS.items():
        axes[0].plot([], [], color=colour, marker="o", linestyle="", label=name)
    for name, marker in _MARKERS.items():
        axes[1].plot([], [], color="#444444", marker=marker, linestyle="", label=name)
    axes[0].legend(title="cache", fontsize=8)
    axes[1].legend(title="reveal", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)

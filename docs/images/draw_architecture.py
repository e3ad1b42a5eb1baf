"""Draws the house, docs/images/architecture.svg, from the imports themselves.

    python docs/images/draw_architecture.py

A box is a folder, in the row of its floor; an arrow goes from a folder to what it imports, thicker for more imports.
"""

import ast
from collections import Counter
from pathlib import Path

from matplotlib import pyplot, rcParams
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "illada_megatron"
ROWS = (
    ("cli",),
    ("training",),
    ("checkpoint/hugging_face", "checkpoint/tools", "generation"),
    ("checkpoint/megatron", "checkpoint", "diffusion"),
    ("data/preprocessing", "checkpoint/files", "model"),
    ("data/corpus", "runtime"),
    ("data/shards",),
    ("data/tokenizers",),
    ("data", "config", "planning", "ops"),
    ("system",),
)
COLOURS = {"data": "#cfe8cf", "checkpoint": "#f6dcc0", "model": "#d6dcf5", "ops": "#d6dcf5", "runtime": "#d6dcf5"}


def folder_of(module: str) -> str | None:
    """The box that a dotted module (or a name in it) lies in."""
    parts = module.split(".")[1:]
    for length in (2, 1):
        folder = "/".join(parts[:length])
        if len(parts) >= length and (PACKAGE / folder / "__init__.py").exists():
            return folder
    return None


def imports() -> Counter[tuple[str, str]]:
    """(importing folder, imported folder) -> number of import statements."""
    found: Counter[tuple[str, str]] = Counter()
    for file in sorted(PACKAGE.rglob("*.py")):
        own = folder_of(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("illada_megatron."):
                target = folder_of(f"{node.module}.{node.names[0].name}")
                if own and target and own != target:
                    found[own, target] += 1
    return found


def main() -> None:
    """Write the drawing; ends with an error where a folder has no place in it, or imports one that is not below it."""
    rcParams["svg.hashsalt"] = "illada"  # the same drawing is the same file
    edges = imports()
    placed = {name for row in ROWS for name in row}
    if missing := {name for edge in edges for name in edge} - placed:
        raise SystemExit(f"docs/images/draw_architecture.py: {sorted(missing)} has no place in ROWS: give it one")
    figure, axes = pyplot.subplots(figsize=(11, 10))
    places = {}
    for number, row in enumerate(ROWS):
        for column, name in enumerate(row):
            x, y = (column + 0.5) * 12 / len(row), (len(ROWS) - number) * 1.5
            places[name] = (x, y)
            files = len(list((PACKAGE / name).glob("*.py"))) - 1
            colour = COLOURS.get(name.split("/")[0], "#eeeeee")
            style = {"boxstyle": "round,pad=0.05", "fc": colour, "ec": "#555555", "zorder": 3}
            axes.add_patch(FancyBboxPatch((x - 1.05, y - 0.28), 2.1, 0.56, **style))
            axes.text(x, y, f"{name}\n{files} files", ha="center", va="center", fontsize=8.5, zorder=4)
    for (source, target), count in sorted(edges.items()):
        (x0, y0), (x1, y1) = places[source], places[target]
        if y0 <= y1:
            raise SystemExit(f"docs/images/draw_architecture.py: {source} imports {target}, which is not below it")
        arrow = FancyArrowPatch(
            (x0, y0 - 0.3),
            (x1, y1 + 0.34),
            arrowstyle="-|>",
            mutation_scale=8,
            connectionstyle="arc3,rad=0.06",
            linewidth=0.5 + 0.12 * min(count, 20),
            color="#777777",
            alpha=0.7,
            zorder=2,
        )
        axes.add_patch(arrow)
    axes.set_xlim(0, 12)
    axes.set_ylim(0.8, 14.2)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(HERE / "architecture.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

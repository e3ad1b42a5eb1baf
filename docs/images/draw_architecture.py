"""Draws the house, docs/images/architecture.svg, from the imports themselves.

    python docs/images/draw_architecture.py

A box is a folder, in the row of its floor; an arrow goes from a folder to what it imports, thicker for more imports.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from matplotlib import pyplot, rcParams
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "illada_megatron"
ROWS = (
    ("cli",),
    ("training", "serving"),
    ("generation", "checkpoint/gguf"),
    ("checkpoint/hugging_face", "checkpoint/tools"),
    ("checkpoint/megatron", "checkpoint", "diffusion"),
    ("data/preprocessing", "checkpoint/files", "model"),
    ("data/corpus", "runtime"),
    ("data/shards",),
    ("data/tokenizers",),
    ("data", "runs", "planning", "ops"),
    ("config",),
    ("config/schema",),
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


def imported_by(file: Path, at_start_only: bool = False) -> Iterator[str]:
    """Modules, or names in them, that a file of the package imports, dotted; at_start_only: not those that a function
    imports when it is called, or that only types need."""
    own = (PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)
    tree = ast.parse(file.read_text())
    for node in tree.body if at_start_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = ".".join(own[: -node.level]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from (f"{module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def imports() -> Counter[tuple[str, str]]:
    """(importing folder, imported folder) -> number of imported names."""
    found: Counter[tuple[str, str]] = Counter()
    for file in sorted(PACKAGE.rglob("*.py")):
        own = folder_of(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
        for name in imported_by(file):
            target = folder_of(name) if name.startswith(f"{PACKAGE.name}.") else None
            if own and target and own != target:
                found[own, target] += 1
    return found


def against_the_order() -> list[str]:
    """What is wrong with the imports: a folder without a place in ROWS, an arrow that does not run down."""
    row_of = {name: number for number, row in enumerate(ROWS) for name in row}
    edges = sorted(imports())
    homeless = {name for edge in edges for name in edge} - row_of.keys()
    wrong = [f"{name} has no place in ROWS: give it one" for name in sorted(homeless)]
    known = [edge for edge in edges if not homeless.intersection(edge)]
    return wrong + [f"{a} imports {b}, which is not below it" for a, b in known if row_of[a] >= row_of[b]]


def described(edges: Counter[tuple[str, str]]) -> str:
    """The arrows in words; the drawing carries them, so that a test sees whether it is of today's imports."""
    return "; ".join(f"{source} -> {target} {count}" for (source, target), count in sorted(edges.items()))


def main() -> None:
    """Write the drawing; ends with an error where a folder has no place in it, or imports one that is not below it."""
    rcParams["svg.hashsalt"] = "illada"  # the same drawing is the same file
    edges = imports()
    if wrong := against_the_order():
        raise SystemExit("docs/images/draw_architecture.py: " + "; ".join(wrong))
    figure, axes = pyplot.subplots(figsize=(11, 11))
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
    axes.set_ylim(0.8, 15.7)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(HERE / "architecture.svg", metadata={"Date": None, "Description": described(edges)})


if __name__ == "__main__":
    main()

"""The order of the house: a folder imports only from lower floors, and a wing only from those before it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "illada_megatron"
FLOORS = (
    {"system"},
    {"config", "planning", "ops"},
    {"runtime", "data"},
    {"diffusion", "model"},
    {"checkpoint", "generation"},
    {"training"},
    {"cli"},
)
# wing -> what else of its own folder it may import
WINGS = {
    "data.tokenizers": {"data.errors"},
    "data.shards": {"data.errors", "data.tokenizers"},
    "data.corpus": {"data.errors", "data.tokenizers", "data.shards"},
    "data.preprocessing": {"data.errors", "data.tokenizers", "data.shards", "data.corpus"},
    "checkpoint.files": set(),
    "checkpoint.megatron": {"checkpoint.files"},
    "checkpoint.tools": {"checkpoint.files", "checkpoint.megatron", "checkpoint.store"},
}


def _imports(file: Path) -> Iterator[str]:
    """Modules of the package that a file names, without the package's name."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.removeprefix("illada_megatron.") for name in names if name.startswith("illada_megatron."))


def _modules() -> list[str]:
    return sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE)


@pytest.mark.parametrize("module", _modules())
def test_imports_run_down(module: str) -> None:
    floor_of = {folder: number for number, floor in enumerate(FLOORS) for folder in floor}
    own, wing = module.split("/")[0], ".".join(module.split("/")[:2])
    for name in _imports(PACKAGE / module):
        folder = name.split(".")[0]
        if folder != own:
            assert floor_of.get(folder, len(FLOORS)) <= floor_of[own], f"{module} imports {name} of a higher floor"
        elif wing in WINGS and not name.startswith(f"{wing}."):
            assert any(f"{name}.".startswith(f"{below}.") for below in WINGS[wing]), f"{module} imports {name}"


def test_every_folder_has_a_floor() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set().union(*FLOORS)

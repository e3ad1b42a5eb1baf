"""The order of the house: a folder imports only what stands below it in the drawing of docs/architecture.md, and
nothing of what its own docstring says is never imported there."""

import html
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("drawing", ROOT / "docs" / "images" / "draw_architecture.py")
assert _spec
assert _spec.loader
drawing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(drawing)

# folder -> what no file in it imports, in the words of "Never imported here" of its __init__; for the package's own
# names without the package's
NEVER = {
    "system": ("torch", "megatron"),
    "config": ("torch", "megatron"),
    "config/schema": ("torch", "megatron", "config.layout", "config.load", "data", "model", "training"),
    "planning": ("torch", "megatron"),
    "runs": ("torch", "megatron", "training", "checkpoint"),
    "ops": ("megatron", "config"),
    "runtime": ("data", "model", "checkpoint", "training"),
    "data": ("torch", "megatron"),
    "data/tokenizers": ("torch", "megatron", "data.shards", "data.corpus", "data.preprocessing"),
    "data/shards": ("torch", "megatron", "config", "data.corpus", "data.preprocessing"),
    "data/corpus": ("torch", "megatron", "data.preprocessing"),
    "data/preprocessing": ("torch", "megatron", "config"),
    "diffusion": ("megatron", "model", "generation"),
    "model": ("checkpoint", "training", "data"),
    "generation": ("megatron", "training", "serving"),
    "serving": ("megatron", "model", "checkpoint", "training", "cli"),
    "checkpoint": ("training", "cli"),
    "checkpoint/files": ("megatron", "model", "training", "checkpoint.megatron", "checkpoint.tools"),
    "checkpoint/megatron": ("checkpoint.tools", "checkpoint.hugging_face", "checkpoint.saver"),
    "checkpoint/tools": ("checkpoint.saver", "checkpoint.state", "model"),
    "checkpoint/hugging_face": ("checkpoint.saver", "checkpoint.megatron", "training"),
    "checkpoint/gguf": ("checkpoint.saver", "checkpoint.megatron", "training"),
    "training": ("cli",),
}


def test_imports_run_down() -> None:
    assert drawing.against_the_order() == []


@pytest.mark.parametrize("folder", NEVER)
def test_what_is_never_imported(folder: str) -> None:
    below = f"{drawing.PACKAGE.name}."
    for file in sorted((drawing.PACKAGE / folder).glob("*.py")):
        for name in drawing.imported_by(file):
            own, outer = name.startswith(below), f"{name.removeprefix(below)}."
            wrong = [
                one for one in NEVER[folder] if outer.startswith(f"{one}.") and (own or one in ("torch", "megatron"))
            ]
            assert not wrong, f"{file.relative_to(ROOT)} imports {name}"


def test_the_command_line_starts_without_torch() -> None:
    for file in sorted((drawing.PACKAGE / "cli").glob("*.py")):
        for name in drawing.imported_by(file, at_start_only=True):
            assert name.split(".")[0] not in ("torch", "megatron"), f"{file.relative_to(ROOT)} imports {name}"


def test_every_folder_says_what_is_never_imported() -> None:
    folders = {str(file.parent.relative_to(drawing.PACKAGE)) for file in drawing.PACKAGE.rglob("__init__.py")} - {"."}
    assert folders - {"cli"} == set(NEVER)
    for folder in folders:
        assert "Never imported here" in (drawing.PACKAGE / folder / "__init__.py").read_text(), folder


def test_the_drawing_is_of_todays_imports() -> None:
    committed = html.unescape((ROOT / "docs" / "images" / "architecture.svg").read_text())
    assert drawing.described(drawing.imports()) in committed, "run python docs/images/draw_architecture.py"

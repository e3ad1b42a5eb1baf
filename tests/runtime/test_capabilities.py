"""What is installed and cannot be used is said to be so, and never taken; the run goes on without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
from illada_megatron.runtime.device import capabilities, has_apex, has_transformer_engine
assert not has_transformer_engine() and not has_apex()
print(*(part.text() for part in capabilities() if part.name == {name!r}))
"""
BROKEN_ENGINES = {
    "the folder that pip leaves behind": ({}, "No module named 'transformer_engine.pytorch'"),
    "its Python files alone": (
        {"__init__.py": "", "pytorch/__init__.py": "class Linear: pass"},
        "No module named 'transformer_engine_torch'",
    ),
    "a library that is missing": (
        {"__init__.py": "import transformer_engine.pytorch", "pytorch/__init__.py": "raise OSError('libnccl.so.2')"},
        "OSError: libnccl.so.2",
    ),
    "an installation that it refuses": (
        {"__init__.py": "assert False, 'Could not find transformer-engine'"},
        "AssertionError: Could not find transformer-engine",
    ),
}


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def _python(folder: Path, arguments: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    environment |= {"COLUMNS": "300"}
    run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("kind", BROKEN_ENGINES)
def test_a_broken_transformer_engine_is_not_usable(tmp_path: Path, kind: str) -> None:
    files, reason = BROKEN_ENGINES[kind]
    _write(tmp_path / "transformer_engine", files)
    text = _python(tmp_path, ["-c", CHECK.format(name="Transformer Engine")])
    assert "not usable, because" in text
    assert reason in text


@pytest.mark.parametrize("kind", BROKEN_ENGINES)
def test_a_run_goes_on_without_a_broken_transformer_engine(
    tmp_path: Path, kind: str, tiny_run: tuple[str, ...]
) -> None:
    """megatron-core alone ends with an AttributeError, a PackageNotFoundError, or what the engine raised."""
    files, reason = BROKEN_ENGINES[kind]
    _write(tmp_path / "transformer_engine", files)
    text = _python(tmp_path, ["-m", "illada_megatron", "train", *tiny_run, "training.exit_steps=1"])
    assert "not usable" in text
    assert reason in text
    assert "loss" in text


def test_doctor_says_what_is_wrong_with_a_broken_transformer_engine(tmp_path: Path) -> None:
    files, reason = BROKEN_ENGINES["an installation that it refuses"]
    _write(tmp_path / "transformer_engine", files)
    text = " ".join(_python(tmp_path, ["-m", "illada_megatron", "doctor"]).split())
    assert f"not usable, because {reason}" in text
    assert f"Transformer Engine: {reason}" in text


def test_apex_without_its_compiled_gemm_is_missing(tmp_path: Path) -> None:
    for folder in ("apex", "apex/multi_tensor_apply"):
        _write(tmp_path / folder, {"__init__.py": ""})
    assert _python(tmp_path, ["-c", CHECK.format(name="Apex (NVIDIA's)")]).startswith("missing")


def test_apex_of_another_torch_is_not_usable(tmp_path: Path) -> None:
    _write(tmp_path / "apex", {"__init__.py": ""})
    _write(tmp_path, {"fused_weight_gradient_mlp_cuda.py": "raise ImportError('undefined symbol: _ZN3c104cuda')"})
    text = _python(tmp_path, ["-c", CHECK.format(name="Apex (NVIDIA's)")])
    assert "not usable, because ImportError: undefined symbol: _ZN3c104cuda" in text

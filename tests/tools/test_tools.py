"""The scripts in tools/ as a user runs them; tests of what they do stand with the package's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

from illada_megatron.checkpoint.tools.compare import compare
from illada_megatron.checkpoint.tools.opening import open_checkpoint

TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def _tool(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_says_what_it_takes(name: str) -> None:
    assert f"Usage: {name}" in _tool(name, "--help")


def test_a_checkpoint_to_hugging_face_and_back(two_steps: Path, tmp_path: Path) -> None:
    """Bit for bit: fp32 weights, exported in fp32."""
    exported, back = tmp_path / "exported", tmp_path / "back"
    _tool("convert_checkpoint.py", "to-hf", two_steps, exported, "--no-tokenizer", "--dtype", "fp32")
    assert (exported / "model.safetensors").exists()
    _tool("convert_checkpoint.py", "from-hf", exported, back, "training.precision=fp32")
    assert compare(open_checkpoint(str(two_steps)), open_checkpoint(str(back)), optimizer=False).identical


def test_a_checkpoint_for_another_layout(two_steps: Path, tmp_path: Path) -> None:
    _tool("reshard_checkpoint.py", two_steps, tmp_path / "new", "--tp", "2", "--processes", "1")
    new = open_checkpoint(str(tmp_path / "new"))
    assert compare(open_checkpoint(str(two_steps)), new).identical
    assert new.config.parallel.tensor_model_parallel_size == 2

"""What is installed and cannot be used is said to be so, and never taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from illada_megatron.runtime.device import capabilities, has_apex, has_transformer_engine
assert not has_transformer_engine() and not has_apex()
print(*(part.text() for part in capabilities() if part.name == "Transformer Engine"))
"""


def _text(folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "No module named 'transformer_engine.pytorch'"),  # the folder that pip leaves behind
        ({"pytorch/__init__.py": "class Linear: pass"}, "No module named 'transformer_engine_torch'"),
        ({"pytorch/__init__.py": "raise OSError('libnccl.so.2: not found')"}, "OSError: libnccl.so.2: not found"),
    ],
)
def test_a_broken_transformer_engine_is_not_usable(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    for name, content in files.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(content)
    text = _text(tmp_path)
    assert "not usable, because" in text
    assert reason in text


def test_apex_without_its_compiled_gemm_is_not_usable(tmp_path: Path) -> None:
    (tmp_path / "apex" / "multi_tensor_apply").mkdir(parents=True)
    for folder in ("apex", "apex/multi_tensor_apply"):
        (tmp_path / folder / "__init__.py").touch()
    assert _text(tmp_path).startswith("missing")

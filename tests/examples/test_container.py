"""The container file's steps, one by one, as far as a machine without Docker and without NVIDIA's image goes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

FOLDER = ROOT / "examples/container"


def _steps() -> list[tuple[str, str]]:
    """(instruction, rest) of each, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line.strip()]


def test_base_image_and_kernels_are_told_from_outside() -> None:
    steps = _steps()
    assert [name for name, _ in steps[:2]] == ["ARG", "FROM"]
    assert steps[0][1].startswith("IMAGE=nvcr.io/nvidia/pytorch:")
    assert steps[1] == ("FROM", "${IMAGE}")
    assert ("ARG", "ILLADA_CUDA=1") in steps


def test_requirements_leave_the_image_s_torch(tmp_path: Path) -> None:
    """The first RUN with pip replaced by what it is told: no torch of ours, and the image's as a constraint."""
    first = next(rest for name, rest in _steps() if name == "RUN")
    place = tmp_path / "tmp"
    place.mkdir()
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    command = first.replace("python -m pip install", "echo").replace("python", sys.executable)
    command = command.replace("/tmp/", f"{place}/")
    ran = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    others = [line for line in lines if not line.startswith("torch==")]
    assert len(others) == len(lines) - 1
    assert (place / "requirements.txt").read_text().splitlines() == others
    assert (place / "torch.txt").read_text().startswith("torch==")
    assert f"--constraint {place}/torch.txt" in ran.stdout


def test_the_ignore_file_leaves_what_the_build_needs() -> None:
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    for needed in ("csrc", "illada_megatron", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        assert needed not in ignored
        assert (ROOT / needed).exists()


@pytest.mark.slow
def test_install_step_builds_the_package_and_doctor_runs(tmp_path: Path) -> None:
    """The second and third RUN, without CUDA, into a folder instead of the image's site-packages."""
    _, second, third = (rest for name, rest in _steps() if name == "RUN")
    skipped = shutil.ignore_patterns(".git", ".venv*", "build", "demo", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "illada", ignore=skipped)
    command = second.replace("${ILLADA_CUDA}", "0").replace("python", sys.executable, 1)
    command = command.replace("install", f"install --target {tmp_path / 'site'}", 1)
    ran = subprocess.run(["bash", "-c", command], cwd=tmp_path / "illada", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    assert third == "illada doctor"
    program = [sys.executable, str(tmp_path / "site" / "bin" / "illada"), "doctor"]
    ran = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = "import illada_megatron, json; print(json.dumps(illada_megatron.__file__))"
    place = subprocess.run([sys.executable, "-c", found], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert json.loads(place.stdout).startswith(str(tmp_path / "site"))

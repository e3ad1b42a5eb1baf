"""compute-sanitizer, of the CUDA toolkit, finds nothing in the kernels: memory errors, races, uninitialised reads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CASES = "test_both_passes and (contiguous or misaligned) or test_extreme_logits"


def test_kernels_are_clean(tmp_path: Path) -> None:
    """All tools at once, for each takes most of its time to start torch. Without torch's cache every tensor is an
    allocation of its own, so that overruns are seen."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, found none on PATH nor in /usr/local/cuda/bin")
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", CASES]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *tests]
        with (tmp_path / tool).open("w") as out:
            running[tool] = subprocess.Popen(
                [*command, str(Path(__file__).with_name("test_cuda_device.py"))],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
            )
    ended = {tool: process.wait() for tool, process in running.items()}
    said = {tool: (tmp_path / tool).read_text()[-3000:] for tool in TOOLS}
    assert not any(ended.values()), "\n".join(f"{tool}:\n{said[tool]}" for tool in TOOLS if ended[tool])
    assert all(" passed" in text for text in said.values()), said

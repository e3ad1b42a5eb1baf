"""What the tests of benchmarks share: the command, as it is started from the repository's root."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

Benchmark = Callable[..., dict[str, Any]]
"""benchmark(module, *arguments) -> its last line. Whether its bars hold says nothing in miniature."""


@pytest.fixture
def benchmark() -> Benchmark:
    def run(module: str, *arguments: object) -> dict[str, Any]:
        line = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
        finished = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        report = json.loads(finished.stdout.splitlines()[-1])
        assert report["benchmark"] == module.split(".")[-1]
        assert isinstance(report["holds"], bool)
        return report

    return run

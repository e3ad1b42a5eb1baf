"""The examples of docs/extending.md: their diffs fit today's code, and with all of them applied each check passes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_every_example_is_a_change_that_works(tmp_path: Path) -> None:
    """In a copy of the package; the checks run in one process, each by itself."""
    shutil.copytree(
        ROOT / "illada_megatron", tmp_path / "illada_megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    diffs, checks = _blocks("diff"), _blocks("python")
    assert len(diffs) == len(checks) == len(re.findall("^## A", PAGE.read_text(), re.MULTILINE))
    for diff in diffs:
        applied = subprocess.run(["git", "apply", "-"], input=diff, cwd=tmp_path, capture_output=True, text=True)
        assert applied.returncode == 0, f"{applied.stderr}\n{diff}"
    for number, check in enumerate(checks):
        (tmp_path / f"check_{number}.py").write_text(check)
    runner = "import runpy, sys\nfor path in sys.argv[1:]: runpy.run_path(path)"
    paths = [f"check_{number}.py" for number in range(len(checks))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", runner, *paths], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr

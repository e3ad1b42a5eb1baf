"""The tests marked gpu, in a pytest of their own, and what became of each."""

import os
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.limited import run_limited

_ROOT = Path(__file__).parents[2]
NOTHING_COLLECTED = 5
"""pytest's exit code."""


def run_device_tests(places: list[str], seconds: float) -> dict[str, Any]:
    """Of `places` (files and folders), for that long at most. Their output goes to stderr; returns numbers, the reasons
    of skips with how many they are of, and the names of what failed."""
    with tempfile.TemporaryDirectory(prefix="illada-gpu-") as folder:
        xml = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junit-xml={xml}", *places]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *_path()])}
        code, _ = run_limited(command, _ROOT, seconds, env=environment, stdout=sys.stderr)
        cases = _cases(xml)
    if not cases and code not in (None, 0, NOTHING_COLLECTED):
        return {"exit_code": code, "passed": 0, "skipped": {}, "failed": ["pytest did not start"]}
    found = _counted(cases)
    if code is None:
        found["failed"].append(f"cut off after {seconds:.0f} seconds")
    return {"exit_code": 1 if code is None else code, **found}


def _cases(xml: Path) -> list[ElementTree.Element]:
    """None where pytest was killed before it had written, or while it wrote."""
    try:
        return list(ElementTree.parse(xml).getroot().iter("testcase"))
    except (FileNotFoundError, ElementTree.ParseError):
        return []


def _path() -> list[str]:
    return [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []


def _counted(cases: list[ElementTree.Element]) -> dict[str, Any]:
    skipped: Counter[str] = Counter()
    failed = []
    for case in cases:
        if (skip := case.find("skipped")) is not None:
            skipped[skip.get("message") or "no reason given"] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    passed = len(cases) - skipped.total() - len(failed)
    return {"passed": passed, "skipped": dict(skipped), "failed": failed}

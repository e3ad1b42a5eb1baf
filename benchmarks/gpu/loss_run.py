"""The masked loss alone, beside its matrix products, liger-kernel and cut-cross-entropy where they are installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.loss.loss_cases import FUSED, GEMMS, MAIN_GRAD

_ROOT = Path(__file__).parents[2]
_COMMON = ("--dtype", "bf16", "--masked-share", "0.5")
_DRY = ("--tiny", "--device", "cpu", "--rounds", "1", "--threads", "1")
_DRY_WHO = (GEMMS, "liger-kernel", FUSED, MAIN_GRAD)


def measure_loss(dry: bool) -> dict[str, Any] | str:
    """The last line of `benchmarks.loss.masked_cross_entropy`, whose tables go to stderr; or why there is none."""
    settings = [*_DRY, *(word for one in _DRY_WHO for word in ("--who", one))] if dry else ["--device", "cuda"]
    command = [sys.executable, "-m", "benchmarks.loss.masked_cross_entropy", *_COMMON, *settings]
    ended = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    lines = ended.stdout.splitlines()
    if ended.returncode or not lines:
        return f"its process ended with {ended.returncode}"
    print("\n".join(lines[:-1]), file=sys.stderr)
    return json.loads(lines[-1])

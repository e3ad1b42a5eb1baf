"""The masked loss alone, beside its matrix products, liger-kernel and cut-cross-entropy where they are installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.limited import run_limited
from benchmarks.gpu.step_runs import RunFailedError
from benchmarks.loss.loss_cases import FUSED, GEMMS, MAIN_GRAD

_ROOT = Path(__file__).parents[2]
_COMMON = ("--dtype", "bf16", "--masked-share", "0.5")
_DRY = ("--tiny", "--device", "cpu", "--rounds", "1", "--threads", "1")
_DRY_WHO = (GEMMS, "liger-kernel", FUSED, MAIN_GRAD)


def measure_loss(dry: bool, seconds: float) -> dict[str, Any]:
    """The last line of `benchmarks.loss.masked_cross_entropy`, whose tables go to stderr. Raises RunFailedError: it
    ended with an error, or was not done after so many seconds."""
    settings = [*_DRY, *(word for one in _DRY_WHO for word in ("--who", one))] if dry else ["--device", "cuda"]
    command = [sys.executable, "-m", "benchmarks.loss.masked_cross_entropy", *_COMMON, *settings]
    code, out = run_limited(command, _ROOT, seconds, stdout=subprocess.PIPE)
    if code is None:
        raise RunFailedError(f"not done after {seconds:.0f} seconds")
    lines = out.splitlines()
    if code or not lines:
        raise RunFailedError(f"its process ended with {code}")
    print("\n".join(lines[:-1]), file=sys.stderr)
    return json.loads(lines[-1])
